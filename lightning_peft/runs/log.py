"""Copy of a run's output in its folder."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

# Colours and cursor moves mean nothing in a file.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class _Tee:
    """A stream that also writes whole lines to a file; of a progress bar, its last state."""

    def __init__(self, stream: TextIO, file: TextIO, lock: threading.Lock) -> None:
        self._stream, self._file, self._lock = stream, file, lock
        self._line = ""

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        with self._lock:
            *lines, self._line = (self._line + _ESCAPES.sub("", text)).split("\n")
            # What is printed is not lost with a disk that is full.
            with suppress(OSError):
                for line in lines:
                    self._file.write(line.rstrip("\r").rpartition("\r")[2] + "\n")
                if lines:
                    self._file.flush()
            self._line = self._line.rpartition("\r")[2] or self._line
        return written

    def close_line(self) -> None:
        if self._line.strip():
            self._file.write(self._line.strip("\r") + "\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Copies what is printed and logged in the body to the end of a file."""
    file = path.open("a", encoding="utf-8", errors="replace")
    lock = threading.Lock()
    out, err = sys.stdout, sys.stderr
    tees = _Tee(out, file, lock), _Tee(err, file, lock)
    moved = _handlers_on(err)
    sys.stdout, sys.stderr = tees
    for handler in moved:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for handler in moved:
            handler.setStream(err)
        with suppress(OSError):
            for tee in tees:
                tee.close_line()
        with suppress(OSError):
            file.close()


def _handlers_on(stream: TextIO) -> list[Any]:
    """Returns the log handlers that hold on to ``stream``, so that they follow the copy."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    return [
        handler
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream
    ]
