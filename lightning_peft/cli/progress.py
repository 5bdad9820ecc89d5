"""Saying how far a long command is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_QUIET_SECONDS = 5.0


@contextmanager
def progress_to_stderr() -> Iterator[Any]:
    """Yields a function of what is going on, how much of it is done, and of how much."""
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
        self.said = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.said >= _QUIET_SECONDS:
            self.said = now
            print(f"{what}: {done / max(total, 1):.0%}", file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Keeps libraries from talking between a command's own lines."""
    from os import environ

    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in ("bitsandbytes", "pytorch_lightning", "lightning.pytorch", "httpx"):
        from logging import getLogger

        getLogger(name).setLevel("ERROR")
