"""What the demo does at the moment, said before and while it does it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from lightning_peft.processes import beating

_SECONDS = 2.0


@contextmanager
def phase(console: Console, what: str, has_bar: bool = False) -> Iterator[None]:
    """Shows what the body does: on a terminal in place, elsewhere a line every two seconds.

    With ``has_bar`` the body shows its own progress on a terminal.
    """
    console.print(f"{what} ...", style="dim")
    if console.is_terminal:
        if has_bar:
            yield
            return
        with console.status(what):
            yield
        return
    begun = time.monotonic()

    def tell() -> None:
        console.print(f"  {time.monotonic() - begun:.0f} s", style="dim")

    with beating(tell, _SECONDS):
        yield
