"""Client of the worker process, for commands that answer within a second.

The web process stays light, and a visitor who types need not wait for an interpreter to start.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradio_app.recipe.command_server import IMPORT
from gradio_app.redaction import Redactor
from gradio_app.runs.environment import training_environment
from gradio_app.settings import Settings
from lightning_peft.processes import LineProcess, ProcessExited

_SERVER = Path(__file__).with_name("command_server.py")
# Importing takes seconds; on a slow disk many. It does not count as time of a command.
START_SECONDS = 180.0
IDLE_SECONDS = 600.0
# How often `still_needed` is polled, and how long an interrupted command may take to end.
_POLL_SECONDS = 0.1
_END_SECONDS = 3.0


@dataclass(frozen=True)
class CommandResult:
    """The exit code and the outputs of a command, the error output redacted.

    The code is ``None`` if it took too long or its process died; ``cancelled`` says that it was
    ended, or not begun, as its result was no longer needed.
    """

    code: int | None
    out: str = ""
    err: str = ""
    cancelled: bool = False

    def json(self) -> dict[str, Any] | None:
        """Returns the object that it printed, if it did."""
        try:
            found = json.loads(self.out)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


class CommandWorker:
    """Runs commands of the command line in one long-lived process, in the order they come.

    The process starts with the first command, or with :meth:`start`. It is started again after it
    has died or taken too long, and ends after ``idle_seconds`` without a command.
    """

    def __init__(self, settings: Settings, idle_seconds: float = IDLE_SECONDS) -> None:
        self._settings, self.redactor = settings, Redactor(settings)
        self._idle_seconds = idle_seconds
        # One command at a time: a second thread waits for its turn.
        self._turn = threading.Lock()
        self._process: LineProcess | None = None
        self._ready = False
        self._numbers = itertools.count(1)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._idle: threading.Timer | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Number of the process, while there is one."""
        process = self._process
        return process.pid if process is not None and process.alive else None

    def start(self) -> None:
        """Starts the process without waiting for it, unless it runs already."""
        if self._closed or self.pid is not None or not self._turn.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(OSError, ProcessExited):
                self._started().send({"id": 0, "arguments": [IMPORT]})
        finally:
            self._turn.release()

    def run(
        self,
        arguments: list[str],
        timeout: float,
        still_needed: Callable[[], bool] | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> CommandResult:
        """Runs a command.

        Args:
            arguments: Its name and arguments, as after ``lightning-peft``.
            timeout: For how many seconds it may run once its turn has come.
            still_needed: Polled; once it returns ``False``, the command ends or is not begun.
            on_rows: Called with the number of rows that the command has read so far.
        """
        still_needed = still_needed or (lambda: True)
        while not self._turn.acquire(timeout=_POLL_SECONDS):
            if not still_needed():
                return CommandResult(None, cancelled=True)
        try:
            # A process that had died before it was asked has lost nothing: once more.
            for _ in range(2):
                if self._closed:
                    return CommandResult(None, err="the page is closing")
                if not still_needed():
                    return CommandResult(None, cancelled=True)
                try:
                    return self._run(arguments, timeout, still_needed, on_rows)
                except (OSError, ProcessExited):
                    self._end()
            return CommandResult(None, err="the process that answers has died")
        finally:
            self._turn.release()

    def close(self) -> None:
        """Ends the process."""
        self._closed = True
        self._end()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.cleanup()

    def _run(
        self,
        arguments: list[str],
        timeout: float,
        still_needed: Callable[[], bool],
        on_rows: Callable[[int], None] | None,
    ) -> CommandResult:
        process = self._started()
        number = next(self._numbers)
        try:
            if not self._ready:
                start = next(self._numbers)
                process.send({"id": start, "arguments": [IMPORT]})
                self._answer(process, start, START_SECONDS)
                self._ready = True
            process.send({"id": number, "arguments": arguments})
            answer = self._answer(process, number, timeout, still_needed, on_rows)
        except TimeoutError:
            self._end()
            return CommandResult(None, err=f"no answer within {timeout:g} seconds")
        if answer is None:
            self._interrupt(process, number)
            return CommandResult(None, cancelled=True)
        self._restart_idle_timer()
        err = self.redactor.text(self.redactor.portable(answer["err"]))
        return CommandResult(answer["code"], answer["out"], err)

    def _answer(
        self,
        process: LineProcess,
        number: int,
        timeout: float,
        still_needed: Callable[[], bool] | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> dict[str, Any] | None:
        """Returns the answer with that number; ``None`` once it is no longer needed."""
        end = time.monotonic() + timeout
        while True:
            left = max(0.0, end - time.monotonic())
            try:
                row = process.receive(min(left, _POLL_SECONDS) if still_needed else left)
            except TimeoutError:
                if still_needed is None or left == 0.0:
                    raise
                if not still_needed():
                    return None
                continue
            if row.get("id") != number:
                continue
            if "rows" not in row:
                return row
            if on_rows is not None:
                on_rows(int(row["rows"]))

    def _interrupt(self, process: LineProcess, number: int) -> None:
        """Ends the command of that number; its process too, if that does not help."""
        process.interrupt()
        try:
            self._answer(process, number, _END_SECONDS)
        except (TimeoutError, ProcessExited):
            self._end()
        else:
            self._restart_idle_timer()

    def _started(self) -> LineProcess:
        if self._process is None or not self._process.alive:
            self._end()
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="studio-")
            # An empty folder: modules are imported from the working directory.
            argv, env = [sys.executable, str(_SERVER)], environment(self._settings)
            self._process = LineProcess(argv, self._folder.name, env)
            self._ready = False
        self._restart_idle_timer()
        return self._process

    def _restart_idle_timer(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = threading.Timer(self._idle_seconds, self._end_if_idle)
        self._idle.daemon = True
        self._idle.start()

    def _end_if_idle(self) -> None:
        if self._turn.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._turn.release()

    def _end(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        process, self._process = self._process, None
        if process is not None:
            process.kill()


def environment(settings: Settings, outer: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment of the process: that of a training, without loggers and bars."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**training_environment(settings, outer, loggers=False), **quiet}
