"""Current status of a run: one JSON file, replaced atomically, with the startup time by phase."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from lightning_peft.processes import recorded_process

State = Literal[
    "queued", "preparing", "running", "stopping", "stopped", "finished", "failed", "crashed"
]
# The process is, or should be, at work.
ACTIVE = frozenset({"preparing", "running", "stopping"})


@dataclass(frozen=True)
class Status:
    """What ``status.json`` holds. Times are seconds since 1970.

    Attributes:
        state: As it was written; ``"crashed"`` is never written, but found out when it is read.
        phase: What is being done, in words.
        kind: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; ``"sweep"`` of a sweep.
        step: Optimizer steps done; of a sweep, trials.
        total_steps: Optimizer steps, or trials, in all, where that is known.
        epoch: Number of the epoch, from 0.
        steps_per_second: Over the last steps since the run was started or resumed.
        eta_seconds: What was left at that pace, validations included, at ``eta_at``.
        eta_at: When that was.
        part: How far a phase in parts is: ``{"unit": "rows", "done": 8, "of": 17}``; the units are
            ``"rows"``, ``"batches"`` and ``"samples"``.
        earlier_seconds: How long the sessions before this one took, of a run that was resumed.
        rows: Rows trained on, over all sessions.
        tokens: Tokens of these rows, where batches have an attention mask.
        checkpoint: The newest checkpoint, relative to the run folder.
        pid: Process of the run.
        process_started: When that process was created: a process id is used again.
        started: When the run was started or resumed.
        updated: When this was written: the heartbeat.
    """

    state: State = "preparing"
    phase: str = "starting"
    kind: str = "fit"
    step: int = 0
    total_steps: int | None = None
    epoch: int = 0
    steps_per_second: float | None = None
    eta_seconds: float | None = None
    eta_at: float | None = None
    part: dict[str, Any] | None = None
    earlier_seconds: float = 0.0
    rows: int = 0
    tokens: int = 0
    checkpoint: str | None = None
    pid: int = 0
    process_started: float = 0.0
    started: float = 0.0
    updated: float = 0.0


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that readers see whole: the old one, or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_status(path: Path, inspect_process: bool = True) -> Status | None:
    """Returns the status in a file; ``None`` where there is no such file yet.

    It is ``"crashed"`` if its process ended without a final status, unless that process is on
    another machine and cannot be inspected.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    known = {field.name for field in fields(Status)}
    status = Status(**{name: value for name, value in content.items() if name in known})
    if inspect_process and status.state in ACTIVE and not is_alive(status):
        return replace(status, state="crashed", eta_seconds=None)
    return status


def _earlier_status(path: Path, kind: str) -> Status:
    """Returns the status of the previous session, or a new one."""
    try:
        status = read_status(path)
    except (ValueError, TypeError, AttributeError, OSError):
        status = None
    resumable = status is not None and status.kind == kind and kind in ("fit", "sweep")
    return status if status is not None and resumable else Status()


def is_alive(status: Status) -> bool:
    """Whether the process that wrote ``status`` is still that process, and not a zombie."""
    return recorded_process(vars(status), "pid", "process_started") is not None


class StatusFile:
    """Keeps ``status.json`` up to date, from any thread; its heartbeat is every so many seconds."""

    def __init__(self, path: Path, kind: str, heartbeat: float = 5.0) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._closed = threading.Event()
        before = _earlier_status(path, kind)
        process = psutil.Process()
        self.status = Status(
            kind=kind,
            pid=process.pid,
            process_started=process.create_time(),
            started=time.time(),
            # As of a run that goes on; one that begins again in the folder forgets it.
            earlier_seconds=before.earlier_seconds + max(0.0, before.updated - before.started),
            rows=before.rows,
            tokens=before.tokens,
        )
        self.update()
        self._thread = threading.Thread(
            target=self._write_heartbeats, args=(heartbeat,), daemon=True
        )
        self._thread.start()

    def update(self, **changes: Any) -> None:
        """Changes fields of the status and writes it."""
        with self._lock:
            self.status = replace(self.status, **changes, updated=time.time())
            write_json(self.path, asdict(self.status))

    def close(self) -> None:
        """Ends the heartbeat."""
        self._closed.set()
        self._thread.join()

    def _write_heartbeats(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            # The process that trains will say so, with the reason.
            with contextlib.suppress(OSError):
                self.update()


class StartTimes:
    """Seconds of the phases before the first step, from the start of the process."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self.phases: list[tuple[str, float]] = []

    def ended(self, phase: str) -> None:
        """Notes that a phase has ended just now; the next one begins."""
        now = time.time()
        self.phases.append((phase, max(0.0, now - self._last)))
        self._last = now

    def table(self) -> str:
        """Returns the phases as lines."""
        whole = sum(seconds for _, seconds in self.phases)
        width = max(len(phase) for phase, _ in self.phases)
        lines = [f"\n  {phase:<{width}}  {seconds:6.1f} s" for phase, seconds in self.phases]
        return f"The first step was done after {whole:.1f} s:" + "".join(lines)
