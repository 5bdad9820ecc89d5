"""One process of ``lightning-peft chat --serve``: lines to it, lines from it, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import psutil

from gradio_app.runs.files import parse_row, tail

_LAST_LINES = 3


class ProcessExited(Exception):
    """The process has ended, or was ended because nothing came from it."""


class ModelProcess:
    """A process that holds a model.

    It leads a process group of its own, and ends by itself when the server does: its input ends.

    Args:
        words: The command.
        folder: Where it runs.
        environment: All that it sees of the server's environment.
    """

    def __init__(self, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        # A file: nobody reads what it prints while it lives, and a full pipe would stop it.
        self._errors = tempfile.NamedTemporaryFile(prefix="lightning-peft-chat-")  # noqa: SIM115
        self._rows: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._process = subprocess.Popen(
            list(words),
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        threading.Thread(target=self._read, name="speaker", daemon=True).start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it is there."""
        return self._process.poll() is None

    @property
    def resident_bytes(self) -> int:
        """Main memory that it holds now."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    @property
    def waiting(self) -> bool:
        """Whether it has said more than was taken."""
        return not self._rows.empty()

    def last_output(self) -> str:
        """Returns the last lines that it printed for people, without secrets."""
        return tail(Path(self._errors.name), _LAST_LINES)

    def send(self, row: Mapping[str, Any]) -> None:
        """Sends a line.

        Raises:
            Gone: If it is not there to take it.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(row).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise ProcessExited from None

    def next(self, seconds: float) -> dict[str, Any]:
        """Returns the next line.

        Raises:
            Gone: If there is none, as it has ended.
            TimeoutError: If it says nothing for so long.
        """
        try:
            row = self._rows.get(timeout=seconds)
        except Empty:
            raise TimeoutError from None
        if row is None:
            # For those who ask again.
            self._rows.put(None)
            raise ProcessExited
        return row

    def kill(self) -> None:
        """Ends it by force, with all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.alive:
                os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                row = parse_row(line)
                if row is not None:
                    self._rows.put(row)
        self._process.wait()
        self._rows.put(None)
