"""What torch's allocator holds while something runs, in bytes above what it held before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from profiles import torch_profiler
from record import synchronize


class Allocations:
    """What is allocated from ``start`` to ``stop``: the most at a time, and what is left of it."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.peak = self.left = 0

    def start(self) -> None:
        """Begins to count."""
        import torch

        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._profile = torch_profiler(profile_memory=True)
            self._profile.start()

    def stop(self) -> None:
        """Ends it."""
        import torch

        if self._cuda:
            synchronize("cuda")
            self.peak = torch.cuda.max_memory_allocated() - self._before
            self.left = torch.cuda.memory_allocated() - self._before
            return
        self._profile.stop()
        for _, size in memory_events(self._profile):
            self.left += size
            self.peak = max(self.peak, self.left)


def memory_events(profile: Any) -> list[tuple[int, int]]:
    """Returns when a profile saw memory allocated or freed (negative), with the bytes, in order."""
    events = profile.profiler.kineto_results.events()
    return sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")


def allocations(device: str, run: Callable[[], Any]) -> tuple[int, int]:
    """Returns the most bytes that ``run()`` allocated at a time, and what is left of them.

    What it returns is alive when that is counted.
    """
    watch = Allocations(device)
    watch.start()
    result = run()
    watch.stop()
    del result
    return watch.peak, watch.left
