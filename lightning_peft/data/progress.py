"""Progress reports of reading, for callers without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
_SECONDS = 0.5
_listener: ContextVar[Callable[[int], None] | None] = ContextVar("rows_read", default=None)


@contextmanager
def report_rows_to(listener: Callable[[int], None] | None) -> Iterator[None]:
    """Calls ``listener`` with the number of rows read, twice a second, within the context."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def counted_rows(rows: Iterable[T]) -> Iterator[T]:
    """Yields ``rows`` and gives their number to the listener of :func:`report_rows_to`, if any."""
    listener, last = _listener.get(), time.monotonic()
    for number, row in enumerate(rows, start=1):
        yield row
        if listener is not None and time.monotonic() - last > _SECONDS:
            last = time.monotonic()
            listener(number)
