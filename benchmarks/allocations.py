"""What torch's allocator holds while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def allocations(device: str, run: Callable[[], Any]) -> tuple[int, int]:
    """Returns the most bytes that ``run()`` allocated at a time, and what is left of them.

    What it returns is alive when that is counted.
    """
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        left = torch.cuda.memory_allocated() - before
        del result
        return torch.cuda.max_memory_allocated() - before, left
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        result = run()
    del result
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, now
