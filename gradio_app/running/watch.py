"""What is amiss around a run that it does not say itself: no steps, little disk, little memory."""

from __future__ import annotations

import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from gradio_app.running.store import Run

# A step that takes this many times as long as the ones before it, and this many seconds at least.
STUCK_TIMES, STUCK_SECONDS = 5.0, 60.0
LEAST_DISK = 2 * 10**9
MOST_MEMORY = 95.0
_MOST_RUNS = 100


@dataclass(frozen=True)
class Warned:
    """Something that the visitor should know.

    Attributes:
        kind: ``"stuck"``, ``"disk"`` or ``"memory"``.
        value: Seconds since the last step, bytes free, or percent used.
    """

    kind: str
    value: float


class Watch:
    """Watches the runs whose pages are open.

    Args:
        now: A clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._steps: OrderedDict[str, tuple[tuple[int, str], float]] = OrderedDict()
        self._lock = threading.Lock()

    def warnings(self, run: Run) -> list[Warned]:
        """Returns what is amiss around a run that is at work."""
        if not run.active:
            return []
        found = [self._stuck(run), self._disk(run), self._memory()]
        return [one for one in found if one is not None]

    def _stuck(self, run: Run) -> Warned | None:
        if run.status.state != "running":
            return None
        here, now = (run.status.step, run.status.phase), self._now()
        with self._lock:
            last, since = self._steps.pop(run.id, (here, now))
            since = since if last == here else now
            self._steps[run.id] = (here, since)
            while len(self._steps) > _MOST_RUNS:
                self._steps.popitem(last=False)
        usual = 1 / run.status.steps_per_second if run.status.steps_per_second else 0.0
        passed = now - since
        late = passed > max(STUCK_SECONDS, STUCK_TIMES * usual)
        return Warned("stuck", passed // 60 * 60) if late else None

    def _disk(self, run: Run) -> Warned | None:
        free = shutil.disk_usage(run.folder.path).free
        return Warned("disk", free // 10**8 * 10**8) if free < LEAST_DISK else None

    def _memory(self) -> Warned | None:
        used = psutil.virtual_memory().percent
        return Warned("memory", round(used)) if used > MOST_MEMORY else None
