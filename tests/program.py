"""The program ``lightning-peft`` in real processes, most of which need not wait for imports.

Each has its own streams, signals and end. Most are forked from one that has imported the packages
of others (forking.py). A fresh one shows what only a fresh interpreter can: its very first import,
another order of its sets, and what libraries read of the environment when they are imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
# A fork cannot use a CUDA device that an import has looked at, and not every system forks safely.
FORKS = sys.platform == "linux" and not torch.cuda.is_available()


# A script, as all ranks of a run where there are any; else Lightning starts the others.
SCRIPT = """
import os, runpy, sys
sys.path[:0], sys.argv[:] = {paths!r}, {arguments!r}
os.environ["PYTHONPATH"] = os.pathsep.join({paths!r})
os.environ["MASTER_PORT"] = "{port}"
runpy.run_path(sys.argv[0], run_name="imports")
rank, others = 0, []
for number in range(1, {ranks}):
    others.append(os.fork())
    if not others[-1]:
        rank, others = number, []
        break
if {ranks}:
    from lightning_utilities.core.rank_zero import rank_zero_only
    os.environ["LOCAL_RANK"], rank_zero_only.rank = str(rank), rank
runpy.run_path(sys.argv[0], run_name="__main__")
for other in others:
    if os.waitpid(other, 0)[1]:
        sys.exit("another rank failed")
"""


class Forked:
    """What tests need of ``subprocess.Popen``, for a process that has another parent."""

    def __init__(self, parent: subprocess.Popen[bytes], streams: list[Path]) -> None:
        self._answers, self._streams = parent.stdout, streams
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self, timeout: float | None = 0) -> int | None:
        """Returns the exit code, or ``None`` while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], timeout)[0]:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the process at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Returns the output of both streams once the process has ended."""
        self.poll(timeout=None)
        out, err = (stream.read_text(encoding="utf-8") for stream in self._streams)
        return out, err


def wait(process: Any, there: Callable[[], Any]) -> None:
    """Waits until something is there or the process has ended; pytest ends a test that hangs."""
    while process.poll() is None and not there():
        time.sleep(0.02)


class Program:
    """Starts the program, one process at a time; they share a cache of prepared data."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._parent: subprocess.Popen[bytes] | None = None
        self._last: Forked | None = None

    def start(
        self,
        folder: Path,
        *words: str,
        fresh: bool = False,
        code: str = "",
        given: str = "",
        **environment: str,
    ) -> Forked | subprocess.Popen[str]:
        """Starts it, or ``code``, in a folder, in a fresh interpreter if that is asked for.

        ``given`` is its standard input, ``environment`` comes on top of that of the tests; a fork
        has imported other packages without it.
        """
        self._count += 1
        (asked := self._folder / f"{self._count}.in").write_text(given, encoding="utf-8")
        environment = self._environment() | environment
        if fresh or not FORKS:
            module = ["-c", code] if code else ["-m", "lightning_peft.cli"]
            return subprocess.Popen(
                [sys.executable, *module, *words],
                cwd=folder,
                env=environment,
                text=True,
                stdin=asked.open(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._end_last()
        streams = [self._folder / f"{self._count}.{name}" for name in ("out", "err")]
        job = {"words": words, "code": code, "folder": str(folder), "environment": environment}
        job["streams"] = list(map(str, [asked, *streams]))
        parent = self._forking()
        parent.stdin.write(json.dumps(job).encode() + b"\n")
        self._last = Forked(parent, streams)
        return self._last

    def run(self, folder: Path, *words: str, **given: Any) -> tuple[int, str, str]:
        """Runs it to its end, and returns its exit code, output and errors.

        What it started and has left, such as other ranks, is ended.
        """
        process = self.start(folder, *words, **given)
        try:
            out, err = process.communicate()
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, out, err

    def succeed(self, folder: Path, *words: str, **given: Any) -> str:
        """Runs it to its end, which has to be a good one, and returns its output."""
        code, out, err = self.run(folder, *words, **given)
        assert code == 0, err[-3000:]
        return out

    def run_script(self, folder: Path, script: Path, *words: str, ranks: int = 0) -> str:
        """Runs a script of tests in a folder, as so many ranks, and returns its output.

        Ranks are forked from one process, and share the seed of their hashes: with 0, Lightning
        starts the others as for a user, each with an order of its sets of its own.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = [str(script), *words]
        paths = [str(script.parent), str(HERE), str(HERE.parent)]
        code = SCRIPT.format(paths=paths, arguments=arguments, port=port, ranks=ranks)
        return self.succeed(folder, code=code)

    def _environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        own |= {"XDG_CACHE_HOME": str(self._folder / "cache"), "COLUMNS": "200"}
        return {**os.environ, **own}

    def _forking(self) -> subprocess.Popen[bytes]:
        if self._parent is None:
            self._parent = subprocess.Popen(
                [sys.executable, str(HERE / "forking.py")],
                cwd=self._folder,
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
        return self._parent

    def _end_last(self) -> None:
        if self._last is not None:
            self._last.kill()
            self._last.poll(timeout=60)

    def close(self) -> None:
        """Ends what still runs."""
        self._end_last()
        if self._parent is not None:
            self._parent.stdin.close()
            self._parent.wait(timeout=60)
            self._parent.stdout.close()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command here, which ends with 2 or another code, and returns its errors."""
    from lightning_peft.cli import main

    def run(*words: Any, code: int = 2) -> str:
        try:
            found = main([*map(str, words)])
        except SystemExit as stop:
            found = stop.code
        said = capsys.readouterr().err
        assert found == code, (words, said)
        # A log handler of another test may write to a stream that is closed.
        assert "Traceback" not in said.replace("--- Logging error ---\nTraceback", "")
        return said

    return run


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Starts ``lightning-peft`` in processes of its own."""
    made = Program(tmp_path_factory.mktemp("program"))
    yield made
    made.close()
