"""Warnings a run cannot report itself: no progress, low disk space, low memory."""

from __future__ import annotations

import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from gradio_app.runs.types import Run

# A step that takes this many times as long as the ones before it, and this many seconds at least.
STUCK_FACTOR, STUCK_SECONDS = 5.0, 60.0
MIN_DISK_BYTES = 2 * 10**9
MAX_MEMORY_PERCENT = 95.0
_MAX_RUNS = 100


@dataclass(frozen=True)
class HealthWarning:
    """Something that the visitor should know.

    ``"stuck"`` with the seconds since the last step, ``"disk"`` with the bytes free, or
    ``"memory"`` with the percentage used.
    """

    kind: str
    value: float


class HealthMonitor:
    """Watches the runs whose pages are open."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._steps: OrderedDict[str, tuple[tuple[int, str], float]] = OrderedDict()
        self._lock = threading.Lock()

    def warnings(self, run: Run) -> list[HealthWarning]:
        """Returns the problems around an active run."""
        if not run.active:
            return []
        found = [self._stuck(run), _disk(run), _memory()]
        return [one for one in found if one is not None]

    def _stuck(self, run: Run) -> HealthWarning | None:
        if run.status.state != "running":
            return None
        here, now = (run.status.step, run.status.phase), self._now()
        with self._lock:
            last, since = self._steps.pop(run.id, (here, now))
            since = since if last == here else now
            self._steps[run.id] = (here, since)
            while len(self._steps) > _MAX_RUNS:
                self._steps.popitem(last=False)
        usual = 1 / run.status.steps_per_second if run.status.steps_per_second else 0.0
        passed = now - since
        late = passed > max(STUCK_SECONDS, STUCK_FACTOR * usual)
        return HealthWarning("stuck", passed // 60 * 60) if late else None


def _disk(run: Run) -> HealthWarning | None:
    free = shutil.disk_usage(run.folder.path).free
    return HealthWarning("disk", free // 10**8 * 10**8) if free < MIN_DISK_BYTES else None


def _memory() -> HealthWarning | None:
    used = psutil.virtual_memory().percent
    return HealthWarning("memory", round(used)) if used > MAX_MEMORY_PERCENT else None
