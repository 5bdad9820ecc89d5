"""Commands that answer within a second: one process for all that has imported torch already.

The web process stays light, and a visitor who types need not wait for an interpreter to start.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
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
from gradio_app.settings import Settings

_WORKER = Path(__file__).with_name("command_server.py")
# Importing everything takes seconds; on a slow disk many. No command's time is counted before.
START_SECONDS = 180.0
IDLE_SECONDS = 600.0
# How often a command is looked at that may not be wanted any more, and how long it may take to end.
_LOOK_SECONDS = 0.1
_END_SECONDS = 3.0
_NAMES = {
    *("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "SYSTEMROOT"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "LD_LIBRARY_PATH"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
}
_BEGINNINGS = ("LC_", "XDG_", "HF_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "TORCH", "BNB_")
# The token of whoever owns a Space opens what no visitor may see.
_OWNERS = {"HF_TOKEN", "HF_TOKEN_PATH"}


@dataclass(frozen=True)
class CommandResult:
    """What came of a command.

    Attributes:
        code: Its exit code; ``None`` if it took too long, or its process died.
        out: What it wrote to its standard output.
        err: What it wrote to its error output, as it is given out.
        cancelled: Whether it was ended, or never begun, since its answer was not wanted any more.
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

    The process starts with the first command, or with :meth:`start`; it is started again after it
    has died or taken too long, and ends when nobody has asked anything for minutes.

    Args:
        settings: What the server was started with.
        idle_seconds: After how long without a command the process ends.

    Attributes:
        redactor: How what commands say is given out.
    """

    def __init__(self, settings: Settings, idle_seconds: float = IDLE_SECONDS) -> None:
        self._space = settings.space
        self.redactor = Redactor(settings)
        self._idle_seconds = idle_seconds
        # One command at a time: a second thread waits for its turn.
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ready = False
        self._numbers = itertools.count(1)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._idle: threading.Timer | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Number of the process, while there is one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Starts the process, without waiting for it; nothing if it runs, or a command is run."""
        if self._closed or self.pid is not None or not self._turn.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(OSError):
                _send(self._started(), 0, [IMPORT])
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
        still_needed = still_needed or _true
        while not self._turn.acquire(timeout=_LOOK_SECONDS):
            if not still_needed():
                return CommandResult(None, cancelled=True)
        try:
            if self._closed:
                return CommandResult(None, err="the page is closing")
            for attempt in range(2):
                if not still_needed():
                    return CommandResult(None, cancelled=True)
                answer = self._asked(arguments, timeout, still_needed, on_rows)
                # One that had died before it was asked has lost nothing.
                if answer is not None or attempt:
                    break
            return answer or CommandResult(None, err="the process that answers has died")
        finally:
            self._turn.release()

    def close(self) -> None:
        """Ends the process."""
        self._closed = True
        self._end()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.cleanup()

    def _asked(
        self,
        arguments: list[str],
        timeout: float,
        still_needed: Callable[[], bool],
        on_rows: Callable[[int], None] | None,
    ) -> CommandResult | None:
        process = self._started()
        number = next(self._numbers)
        try:
            if not self._ready:
                start = next(self._numbers)
                _send(process, start, [IMPORT])
                self._ready = self._answer(start, START_SECONDS) is not None
            _send(process, number, arguments)
            answer = self._answer(number, timeout, still_needed, on_rows)
        except OSError:
            self._end()
            return None
        except _Cancelled:
            return CommandResult(None, cancelled=True)
        except queue.Empty:
            self._end()
            return CommandResult(None, err=f"no answer within {timeout:g} seconds")
        if answer is None:
            self._end()
            return None
        self._restart_idle_timer()
        err = self.redactor.text(self.redactor.portable(answer["err"]))
        return CommandResult(answer["code"], answer["out"], err)

    def _answer(
        self,
        number: int,
        timeout: float,
        still_needed: Callable[[], bool] | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> dict[str, Any] | None:
        """Returns the answer of that number; ``None`` if the process has ended.

        Raises:
            queue.Empty: If it does not come in time.
            _Cancelled: If it is not wanted any more; the process is then free for the next.
        """
        end = time.monotonic() + timeout
        while True:
            left = max(0.0, end - time.monotonic())
            try:
                line = self._answers.get(timeout=min(left, _LOOK_SECONDS) if still_needed else left)
            except queue.Empty:
                if still_needed is None or left == 0.0:
                    raise
                if not still_needed():
                    self._interrupt(number)
                    raise _Cancelled from None
                continue
            if line is None:
                return None
            try:
                found: dict[str, Any] = json.loads(line)
            except ValueError:
                # Half a line, where the command was interrupted.
                continue
            if found["id"] != number:
                continue
            if "rows" not in found:
                return found
            if on_rows is not None:
                on_rows(int(found["rows"]))

    def _interrupt(self, number: int) -> None:
        """Ends the command of that number; its process too, if that does not help."""
        process = self._process
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            alive = self._answer(number, _END_SECONDS) is not None
        except queue.Empty:
            alive = False
        if alive:
            self._restart_idle_timer()
        else:
            self._end()

    def _started(self) -> subprocess.Popen[str]:
        if self._idle is not None:
            self._idle.cancel()
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="studio-")
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            # An empty folder: modules are imported from the working directory.
            cwd=self._folder.name,
            env=environment(self._space),
            start_new_session=True,
        )
        self._answers, self._ready = queue.SimpleQueue(), False
        reader = threading.Thread(
            target=_read, args=(self._process, self._answers), name="warm", daemon=True
        )
        reader.start()
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
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()


class _Cancelled(Exception):
    """What a command would answer is not wanted any more."""


def _true() -> bool:
    return True


def _send(process: subprocess.Popen[str], number: int, arguments: list[str]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"id": number, "arguments": arguments}) + "\n")
    process.stdin.flush()


def _read(process: subprocess.Popen[str], answers: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            answers.put(line)
    answers.put(None)


def environment(space: bool, outer: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the environment of the process: what the commands need, and no one's secrets.

    Args:
        space: Whether strangers ask.
        outer: The environment of the server.
    """
    kept = {k: v for k, v in outer.items() if k in _NAMES or k.startswith(_BEGINNINGS)}
    if space:
        kept = {k: v for k, v in kept.items() if k not in _OWNERS}
        # Or the library would look for the token in a file of the owner's.
        kept["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    return {**kept, "PYTHONIOENCODING": "utf-8", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
