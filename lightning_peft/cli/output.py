"""Output of commands: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from logging import getLogger
from os import environ
from typing import Any

_QUIET_SECONDS = 5.0


def print_json(result: Any) -> None:
    """Prints a result as JSON."""
    print(json.dumps(result, indent=2))


def to_stderr(condition: bool = True) -> AbstractContextManager[Any]:
    """Whatever the body and the libraries that it calls print goes to the error output."""
    return redirect_stdout(sys.stderr) if condition else nullcontext()


def print_report(
    args: Namespace, make: Callable[[Namespace], Any], show: Callable[[Any], None]
) -> Any:
    """Makes a report for a command's options, prints it as JSON or by ``show``, and returns it."""
    with to_stderr():
        report = make(args)
    if args.json:
        print_json(report)
    else:
        show(report)
    return report


def print_table(rows: Sequence[Mapping[str, str]], caption: str | None = None) -> None:
    """Prints rows of equal keys: a table on a terminal, lines with tabs elsewhere."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row.values()))
        if caption:
            print(caption)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(*rows[0], caption=caption)
    for row in rows:
        table.add_row(*map(escape, row.values()))
    console.print(table)


@contextmanager
def progress_to_stderr() -> Iterator[Any]:
    """Yields a function of what is done, and how much of it of how much.

    It shows a bar on a terminal, and now and then prints a line elsewhere.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=max(total, 1))

        yield show


class _Lines:
    def __init__(self) -> None:
        self.printed = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.printed >= _QUIET_SECONDS:
            self.printed = now
            print(f"{what}: {done / max(total, 1):.0%}", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keeps libraries from printing between a command's own lines."""
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("bitsandbytes", "pytorch_lightning", "lightning.pytorch", "httpx"):
        getLogger(name).setLevel("ERROR")
