"""The command line ``lightning-peft``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, version
from itertools import chain
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from lightning_peft.errors import ConfigError, LightningPeftError, first_line, similar_names
from lightning_peft.torchvision_errors import loading_problem

# The commands by group, which are modules of this room with ABOUT and main. Their heavy parts load
# when they run: help must come at once.
GROUPS: dict[str, tuple[str, ...]] = {
    "Get started": ("demo", "doctor", "migrate"),
    "Prepare": ("recipes", "preview", "check", "plan"),
    "Train": ("fit", "validate", "test", "predict"),
    "Tune": ("sweep",),
    "Verify": ("verify", "reproduce"),
    "Use the result": ("chat", "compare", "evaluate", "merge", "export"),
    "Maintenance": ("cache", "import"),
}
# Entry points of other packages' commands: each is a module like those of this room.
EXTENSIONS = "lightning_peft.commands"


class Command(NamedTuple):
    """What a command does in a sentence, and its function, which returns the exit code."""

    about: str
    main: Callable[[Sequence[str]], int]


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
    try:
        code = find_command(words[0]).main(words[1:])
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
    except Exception as error:
        problem = loading_problem(error)
        if problem is None:
            raise
        print(f"lightning-peft: {problem}", file=sys.stderr)
        return 2


def command_groups() -> dict[str, tuple[str, ...]]:
    """Returns the names of all commands by group, those of other packages in the last one."""
    return GROUPS | {"Extensions": tuple(_extensions())}


def command_names() -> list[str]:
    """Returns the names of all commands."""
    return [*chain(*command_groups().values())]


def find_command(name: str) -> Command:
    """Returns a command."""
    if name in GROUPS["Train"]:
        from lightning_peft.cli import training

        return Command(training.ABOUT[name], partial(training.main, name))
    if name in chain(*GROUPS.values()):
        module = import_module(f"lightning_peft.cli.{name}")
        return Command(module.ABOUT, module.main)
    if name in (extensions := _extensions()):
        return _loaded(extensions[name])
    near = similar_names(name, command_names())
    raise ConfigError(f"there is no command {name!r}{near}.")


def _loaded(point: EntryPoint) -> Command:
    try:
        module = point.load()
        return Command(module.ABOUT, module.main)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the command {point.name!r} cannot be loaded from {point.value!r} "
            f"({first_line(error)}). Repair or uninstall the package that it came with."
        ) from error


def _extensions() -> dict[str, EntryPoint]:
    """Returns the entry points by name; those of others replace no command of this distribution.

    Those of this distribution are read from a checkout's own file where there is one: the metadata
    of an editable install is that of the day of the install.
    """
    points = sorted(entry_points(group=EXTENSIONS), key=_is_own)
    found = {point.name: point for point in points}
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        heading = re.escape(f'[project.entry-points."{EXTENSIONS}"]')
        table = re.search(rf"^{heading}\n([^\[]*)", project.read_text("utf-8"), re.MULTILINE)
        for name, value in re.findall(r'^(\S+) = "(.+)"$', table[1] if table else "", re.MULTILINE):
            found[name] = EntryPoint(name, value, EXTENSIONS)
    return {name: found[name] for name in sorted(found.keys() - set(chain(*GROUPS.values())))}


def _is_own(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == "lightning-peft"


def _about(name: str) -> str:
    try:
        return find_command(name).about
    except ConfigError as error:
        return str(error)


def _overview() -> str:
    lines = ["usage: lightning-peft COMMAND ...", "", "LoRA and QLoRA for PyTorch Lightning.", ""]
    for group, names in command_groups().items():
        lines.append(f"{group}:")
        for name in names:
            start = f"  {name:<12}"
            lines.append(fill(_about(name), 92, initial_indent=start, subsequent_indent=" " * 14))
        lines.append("")
    return "\n".join([*lines, "Run `lightning-peft COMMAND --help` for details."])
