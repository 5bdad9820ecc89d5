"""``lightning-peft fit``, ``validate``, ``test`` and ``predict``: a recipe, run by LightningCLI."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lightning_peft.cli.recipes import find_recipe, resolved
from lightning_peft.errors import ConfigError, LightningPeftError

ABOUT = {
    "fit": "Train what a recipe or config of LightningCLI describes.",
    "validate": "Evaluate it on the validation data.",
    "test": "Evaluate it on the test data.",
    "predict": "Run its predict steps.",
}


def main(subcommand: str, arguments: Sequence[str]) -> int:
    """Runs one of the four.

    Args:
        subcommand: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        arguments: LightningCLI's arguments; ``--config`` also takes the name of a recipe.

    Returns:
        The exit code: 0; 1 where the run failed for a reason that it can explain; 2 for input
        that cannot be used; 130 after an interrupt.
    """
    words = list(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            saved = import_module("lightning_peft.plugin.lightning_cli").run_subcommand(
                subcommand, _with_files(words, Path(folder))
            )
    except ConfigError as error:
        print(f"lightning-peft: {error}", file=sys.stderr)
        return 2
    except LightningPeftError as error:
        print(f"lightning-peft: {error}", file=sys.stderr)
        return 1
    if saved is None:
        return 0
    saved = saved.relative_to(Path.cwd()) if saved.is_relative_to(Path.cwd()) else saved
    again = " ".join(["lightning-peft", subcommand, *_without_checkpoint(words)])
    print(f"Saved {saved}. Go on from there:\n  {again} --ckpt_path {saved}", file=sys.stderr)
    return 130


def _with_files(words: Sequence[str], folder: Path) -> list[str]:
    """Returns the arguments with every ``--config`` as a file that LightningCLI can read."""
    done: list[str] = []
    for word in words:
        name = None
        if word.startswith("--config="):
            name = word.partition("=")[2]
        elif done and done[-1] == "--config":
            done.pop()
            name = word
        if name is None:
            done.append(word)
            continue
        file = folder / f"{len(done)}-{Path(name).stem}.yaml"
        file.write_text(resolved(find_recipe(name)), encoding="utf-8")
        done.append(f"--config={file}")
    return done


def _without_checkpoint(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] == "--ckpt_path":
            kept.pop()
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return kept
