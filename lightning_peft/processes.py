"""Child processes: JSON-lines exchange, and detached processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, BinaryIO

import psutil


class ProcessExited(Exception):
    """The process has ended."""


class LineProcess:
    """A process that reads and writes JSON objects, one a line.

    It leads a process group of its own, ``env`` is its whole environment, and its input ends when
    this process does.
    """

    def __init__(
        self,
        argv: Sequence[str],
        cwd: str | Path,
        env: Mapping[str, str],
        stderr: IO[bytes] | int = subprocess.DEVNULL,
    ) -> None:
        self._rows: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._process = subprocess.Popen(
            list(argv),
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        threading.Thread(target=self._read, name="json-lines", daemon=True).start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def has_pending(self) -> bool:
        """Whether it has written rows that were not received yet."""
        return not self._rows.empty()

    def send(self, row: Mapping[str, Any]) -> None:
        """Sends a row."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(row).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise ProcessExited from None

    def receive(self, timeout: float) -> dict[str, Any]:
        """Returns the next row that is an object, within ``timeout`` seconds."""
        try:
            row = self._rows.get(timeout=timeout)
        except Empty:
            raise TimeoutError from None
        if row is None:
            # For the next call.
            self._rows.put(None)
            raise ProcessExited
        return row

    def interrupt(self) -> None:
        """Sends SIGINT to the process."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Ends the process and all that it has started by force."""
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
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if isinstance(row, dict):
                        self._rows.put(row)
        self._process.wait()
        self._rows.put(None)


def claim_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """Returns the standard input and output of a child process, for its protocol alone.

    From then on, libraries that print write to the error output, and those that read get nothing.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    os.dup2(sys.stdin.fileno(), 0)
    return requests, replies


def start_detached(
    argv: Sequence[str],
    cwd: str | Path,
    env: Mapping[str, str],
    stdout: IO[bytes],
    stderr: IO[bytes] | int = subprocess.STDOUT,
) -> subprocess.Popen[bytes]:
    """Starts a process that goes on when this one ends; ``env`` is its whole environment."""
    return subprocess.Popen(
        list(argv),
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def process_record(pid: int) -> dict[str, Any]:
    """Returns the identity of a process: ``pid`` and its ``created`` time, 0.0 if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {"pid": pid, "created": float(psutil.Process(pid).create_time())}
    return {"pid": pid, "created": 0.0}


def recorded_process(
    record: Mapping[str, Any], pid: str = "pid", created: str = "created"
) -> psutil.Process | None:
    """Returns the running process of a record, never another one with its number.

    ``pid`` and ``created`` are the keys of its process id and creation time.
    """
    try:
        process = psutil.Process(int(record[pid]))
        same = abs(process.create_time() - float(record[created])) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (KeyError, TypeError, ValueError, psutil.Error):
        return None


def usable_cores() -> int:
    """Returns on how many CPU cores this process may run; on macOS, how many there are."""
    affinity = getattr(psutil.Process(), "cpu_affinity", list)
    return len(affinity()) or os.cpu_count() or 1


def lead_own_group(worker: int) -> None:
    """Takes the worker of a ``DataLoader`` out of the group of the process that started it.

    Ctrl-C, and launchers that end a job, signal the whole group. The step that is finished and
    saved then may need another batch; afterwards the worker ends with its process.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


@contextlib.contextmanager
def beating(tell: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls ``tell`` every so many ``seconds`` within the body, from a thread of its own."""
    ended = threading.Event()

    def beat() -> None:
        # Where nobody reads any more, the body finds out.
        with contextlib.suppress(OSError):
            while not ended.wait(seconds):
                tell()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # What it says must not come after what the caller says next.
        thread.join()
