"""Writes the page with the help of every command, from the commands themselves."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from lightning_peft.cli import GROUPS, command_names, find_command, main

PAGE = Path(__file__).with_name("command-line-reference.md")
_TRAINING = GROUPS["Train"]


def text() -> str:
    """Returns the page."""
    lines = [
        "# Command line reference",
        "",
        "What `lightning-peft COMMAND --help` prints, made with this page.",
        "",
    ]
    for name in command_names():
        lines += [f"## {name}", ""]
        if name in _TRAINING[1:]:
            lines += [f"{find_command(name).about} The options are those of [fit](#fit).", ""]
            continue
        lines += ["```text", _help(name).rstrip(), "```", ""]
    return "\n".join(lines)


def _help(name: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed), _plain():
        try:
            main([name, "--help"])
        except SystemExit as stop:
            if stop.code:
                raise
    return printed.getvalue()


@contextmanager
def _plain() -> Iterator[None]:
    """The same page on every machine: one width, and no colours."""
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ |= {"COLUMNS": "96", "NO_COLOR": "1"}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
