"""Phases of the demo, with their messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from lightning_peft.processes import beating

_SECONDS = 2.0


@contextmanager
def phase(console: Console, what: str) -> Iterator[Callable[[], None]]:
    """Shows what the body does: on a terminal in place, elsewhere a line every two seconds.

    Yields what ends the spinner of a terminal, for a body that goes on with a progress bar.
    """
    console.print(f"{what} ...", style="dim")
    if console.is_terminal:
        with console.status(what) as status:
            yield status.stop
        return
    begun = time.monotonic()

    def tell() -> None:
        console.print(f"  {time.monotonic() - begun:.0f} s", style="dim")

    with beating(tell, _SECONDS):
        yield lambda: None
