"""Startup time of a run until its first step, by phase."""

from __future__ import annotations

import time

import psutil


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
