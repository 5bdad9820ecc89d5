"""``lightning-peft fit``, ``validate``, ``test`` and ``predict``, based on LightningCLI."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.options import OptionParser
from lightning_peft.cli.output import print_json, to_stderr
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.launch import is_started_by_torchrun
from lightning_peft.recipe_files import resolved_recipes

if TYPE_CHECKING:
    from lightning_peft.runs.session import RunSession

ABOUT = {
    "fit": "Train what a recipe or config of LightningCLI describes.",
    "validate": "Evaluate it on the validation data.",
    "test": "Evaluate it on the test data.",
    "predict": "Run its predict steps.",
}
# Short options for the keys that change with the machine.
_PLACES = {
    "--devices": "trainer.devices",
    "--num_nodes": "trainer.num_nodes",
    "--sharding": "trainer.strategy.init_args.sharding",
}
_HELP = """\
usage: lightning-peft {name} --config RECIPE [--config FILE ...] [--KEY VALUE ...]

{about} Everything goes into the folder of the run.

  --config NAME|FILE     a recipe (`lightning-peft recipes`), or a YAML file; several are laid over
                         each other, the last one on top
  --run_dir FOLDER       the folder of this run; by default a new one below `runs`
  --resume RUN           go on in the folder of a run that was stopped or killed
  --ckpt_path FILE       start from this checkpoint, or evaluate it; with --run_dir, `last` is the
                         newest of that folder; `fit` begins there where it has none
  --devices N            processes on this machine, each with a device of its own
  --num_nodes N          machines, each of which runs this command (docs/devices.md)
  --sharding fsdp2       a part of the frozen base in each process
  --verbose              all messages of the libraries, and what took how long until the first step
  --json                 print the result as JSON, and nothing else, to the standard output

Every key of a config can be set here too:

  --model.init_args.learning_rate=1e-4    --data.init_args.data=mine.jsonl
  --trainer.strategy.init_args.r=32       --trainer.max_epochs=1

  --model.help CLASS     the keys of a task, such as lightning_peft.tasks.CausalLM
  --data.help CLASS      the keys of a data module, such as lightning_peft.SupervisedData
  --print_config         the config as it would be run
  --help-all             every key of the Trainer

Ctrl-C finishes the step, saves, and says how to go on; a second one stops at once.

exit code: 0 when done, 1 if the run failed for a reason that it explains, 2 for input that cannot
be used, 130 after an interrupt
"""


def main(subcommand: str, arguments: Sequence[str]) -> int:
    """Runs one of the four with the arguments of LightningCLI, and returns its exit code."""
    if not arguments or set(arguments) & {"-h", "--help"}:
        print(_HELP.format(name=subcommand, about=ABOUT[subcommand]), end="")
        return 0 if arguments else 2
    as_json = "--json" in arguments
    parser = OptionParser(prog=f"lightning-peft {subcommand}", add_help=False)
    parser.add_argument("--resume", nargs="?", const="", action="append", default=[])
    for option in _PLACES:
        parser.add_argument(option)
    args, words = parser.parse_known_args([word for word in arguments if word != "--json"])
    verbose = "--verbose" in words
    words = [word for word in words if word != "--verbose"]
    words = ["--help" if word == "--help-all" else word for word in words]
    # Last, so that they win over configs.
    given = {key: getattr(args, option[2:]) for option, key in _PLACES.items()}
    words += [f"--{key}={value}" for key, value in given.items() if value is not None]
    with to_stderr(as_json):
        if len(args.resume) > 1:
            runs = ", ".join(map(repr, args.resume))
            raise ConfigError(f"--resume names several runs ({runs}); one is resumed. Name one.")
        if args.resume:
            words = _resumed(args.resume[0], words)
        session = run(subcommand, words, verbose=verbose)
    if session.saved is not None:
        if session.folder is not None:
            _print_resume_command(subcommand, session)
        # The agent of torchrun would start again what ends with another code.
        return 0 if is_started_by_torchrun() else 130
    if session.result is not None:
        _show(session, as_json)
    return 0


def run(
    subcommand: str,
    words: Sequence[str],
    decided: dict[str, Any] | None = None,
    verbose: bool = False,
) -> RunSession:
    """Runs one of the four, and returns its result; ``decided`` is what another run decided."""
    from lightning_peft.plugin.lightning_cli import run_subcommand
    from lightning_peft.runs.session import RunSession

    name = Path(_configs(words)[0]).stem if _configs(words) else "run"
    session: RunSession = RunSession(subcommand, name, decided, verbose)
    with resolved_recipes(words) as resolved, session:
        run_subcommand(subcommand, resolved, session)
    return session


def _configs(words: Sequence[str]) -> list[str]:
    configs = []
    for word, after in zip(words, [*words[1:], ""], strict=False):
        if word == "--config":
            configs.append(after)
        elif word.startswith("--config="):
            configs.append(word.partition("=")[2])
    return configs


def _resumed(path: str, words: list[str]) -> list[str]:
    """Returns the arguments with the recipe, folder and checkpoint of the run to go on with."""
    from lightning_peft.runs.folder import RunFolder

    folder = RunFolder(Path(path))
    if not path or not folder.recipe.is_file() or folder.newest_checkpoint() is None:
        lacking = "checkpoint" if path and folder.recipe.is_file() else "recipe.yaml"
        raise ConfigError(
            f"--resume {path!r}: that is not a run folder that can be resumed: it has "
            f"no {lacking}. Name a folder below `runs`, or start a new run with --config."
        )
    folder.check_directory(words)
    own = [f"--config={folder.recipe}", *words]
    return [*own, f"--run_dir={folder.path}", "--ckpt_path=last"]


def _print_resume_command(subcommand: str, session: RunSession) -> None:
    saved = session.saved
    assert saved is not None
    assert session.folder is not None
    again = f"{subcommand} --resume {_short(session.folder.path)}"
    print(f"Saved {_short(saved)}. Go on from there:\n  lightning-peft {again}", file=sys.stderr)


def _short(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _show(session: RunSession, as_json: bool) -> None:
    result = session.result
    assert result is not None
    assert session.folder is not None
    if as_json:
        print_json({**result, "folder": str(session.folder.path)})
        return
    from rich.console import Console

    console = Console(highlight=False)
    names = [name for name in result["after"] if isinstance(result["after"][name], float)]
    if names:
        _show_metrics(console, result, names)
    checkpoint = result["checkpoint"]
    lines = [("run", _short(session.folder.path))]
    if session.kind == "fit" and checkpoint:
        file = Path(checkpoint)
        adapter = file.parent / "adapters" / file.stem
        lines += [("checkpoint", _short(file))]
        lines += [("adapter", _short(adapter))] if adapter.is_dir() else []
    if "validation_share" in result:
        seconds, share = result["validation_seconds"], result["validation_share"]
        print(f"validation  {seconds:.0f} s, {share:.0%} of the time, samples included")
    if session.folder.predictions.is_file():
        lines += [("predictions", _short(session.folder.predictions))]
    for title, path in lines:
        console.print(f"{title:<12}{path}", markup=False, soft_wrap=True)


def _show_metrics(console: Any, result: dict[str, Any], names: list[str]) -> None:
    before = result["before"]
    rows = [
        (name, f"{before[name]:.4g}" if name in before else "", f"{result['after'][name]:.4g}")
        for name in names
    ]
    if not console.is_terminal:
        for name, old, new in rows:
            print(f"{name:<24}{f'{old} -> ' if old else ''}{new}")
        return
    from rich.table import Table

    table = Table()
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
