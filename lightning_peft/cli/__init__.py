"""The command line ``lightning-peft``: parse, call, print."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from textwrap import fill

from lightning_peft.errors import ConfigError, LightningPeftError, similar_names

# What each group of commands is for, and the commands, which are modules of this room. Their heavy
# parts load when they run: help must come at once.
GROUPS: dict[str, tuple[str, ...]] = {
    "Get started": ("demo", "doctor", "app"),
    "Prepare": ("recipes", "preview", "check", "plan"),
    "Train": ("fit", "validate", "test", "predict"),
    "Verify": ("verify", "reproduce"),
    "Use the result": ("chat", "compare", "merge", "export"),
    "Maintenance": ("cache",),
}
COMMANDS = tuple(name for names in GROUPS.values() for name in names)
_TRAINING = GROUPS["Train"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, or 1 where a command failed for a reason it can explain, or 2 for bad
        input, or 130 after an interrupt, or 141 where nobody reads any more.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lightning-peft {version('lightning-peft')}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        hint = similar_names(name, COMMANDS)
        print(f"lightning-peft: there is no command {name!r}{hint}.", file=sys.stderr)
        return 2
    try:
        if name in _TRAINING:
            from lightning_peft.cli import training

            code = training.main(name, rest)
        else:
            code = int(import_module(f"lightning_peft.cli.{name}").main(rest))
        sys.stdout.flush()
        return code
    except LightningPeftError as error:
        print(f"lightning-peft: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("lightning-peft: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads has seen enough, as `head` does. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def about(name: str) -> str:
    """Returns in a sentence what a command does."""
    if name in _TRAINING:
        from lightning_peft.cli.training import ABOUT

        return ABOUT[name]
    return str(import_module(f"lightning_peft.cli.{name}").ABOUT)


def _overview() -> str:
    lines = ["usage: lightning-peft COMMAND ...", "", "LoRA and QLoRA for PyTorch Lightning.", ""]
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        for name in names:
            indent = " " * 14
            lines.append(
                fill(about(name), 92, initial_indent=f"  {name:<12}", subsequent_indent=indent)
            )
        lines.append("")
    return "\n".join([*lines, "Run `lightning-peft COMMAND --help` for details."])
