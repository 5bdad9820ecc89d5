"""Metrics of running and finished runs, read incrementally with bounded memory."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradio_app.runs.curves import Points, downsample
from gradio_app.runs.files import number, parse_row

# Of longer curves, half of the points go: those between the extremes.
MAX_POINTS = 4_000
_NOT_METRICS = frozenset({"step", "epoch", "time", "seconds"})


class Metrics:
    """The numbers of one run so far: points ``(step, value)`` of each metric, steps rising.

    Values may not be finite. ``load.jsonl`` has seconds in the place of steps.
    """

    def __init__(self, file: Path, step: str = "step") -> None:
        self.file, self.key = file, step
        self.curves: dict[str, Points] = {}
        self.latest: dict[str, float] = {}
        self._offset = 0
        self._inode = 0
        self._step: float = -1
        self._lock = threading.Lock()

    def refresh(self) -> Metrics:
        """Reads what is new, and returns itself."""
        with self._lock:
            try:
                found = self.file.stat()
                if found.st_size < self._offset or found.st_ino != self._inode:
                    self._begin(found.st_ino)
                if found.st_size > self._offset:
                    with self.file.open("rb") as opened:
                        opened.seek(self._offset)
                        self._take(opened.read(found.st_size - self._offset))
            except OSError:
                self._begin(0)
        return self

    def _begin(self, inode: int) -> None:
        self.curves, self.latest = {}, {}
        self._offset, self._inode, self._step = 0, inode, -1

    def _take(self, content: bytes) -> None:
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            row = parse_row(line)
            step = row.get(self.key) if row is not None else None
            if row is not None and isinstance(step, (int, float)):
                self._add(step, row)

    def _add(self, step: float, row: dict[str, Any]) -> None:
        if step < self._step:
            # It went on from a checkpoint: what came after that is of a run that was given up.
            for name, points in self.curves.items():
                self.curves[name] = [point for point in points if point[0] <= step]
        self._step = step
        for name, found in row.items():
            value = number(found)
            if name in _NOT_METRICS or value is None:
                continue
            points = self.curves.setdefault(name, [])
            # The last line of a step counts.
            while points and points[-1][0] >= step:
                points.pop()
            points.append((step, value))
            self.latest[name] = value
            if len(points) > MAX_POINTS:
                self.curves[name] = downsample(points, MAX_POINTS // 2)

    def curve(self, name: str) -> Points:
        """Returns the points of a metric, of which there may be none."""
        with self._lock:
            return list(self.curves.get(name, ()))

    def maximum(self, name: str) -> float | None:
        """Returns the greatest value of a metric, over all sessions of the run."""
        return max((value for _, value in self.curve(name)), default=None)


def metrics_of(file: Path) -> Metrics:
    """Returns the numbers in a ``metrics.jsonl`` as they are now."""
    return _metrics(file).refresh()


def load_of(file: Path) -> Metrics:
    """Returns the numbers in a ``load.jsonl`` as they are now, by seconds."""
    return _metrics(file, "seconds").refresh()


# Runs that somebody looks at, or has just looked at.
_metrics = lru_cache(maxsize=64)(Metrics)
