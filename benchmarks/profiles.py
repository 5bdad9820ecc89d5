"""Where the time of a training step goes, in a few groups, from torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

# By the names of operations; the first that fits.
GROUPS: dict[str, tuple[str, ...]] = {
    "dequantize": ("bitsandbytes::",),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "matmul": ("::mm", "::addmm", "::bmm", "::baddbmm", "::linear", "mkldnn", "gemm"),
    "cross-entropy": ("log_softmax", "nll_loss", "logsumexp"),
}
# By what an operation runs in, for those that could be anywhere.
WITHIN: dict[str, str] = {
    "Optimizer.step": "optimizer",
    "Optimizer.zero_grad": "optimizer",
    "ChunkedLoss": "cross-entropy",
}
REST = "rest"


def torch_profiler(**more: Any) -> Any:
    """Returns torch's profiler for this machine's devices."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, **more)


def shares(events: Any) -> dict[str, Any]:
    """Returns shares of the self times: ``groups``, and the eight largest ``operations``."""
    groups: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    closures = _ends_of_closures(events)
    for event in events:
        # On a GPU the time of its kernels, which is attributed to the operation that launched them.
        spent = float(event.self_device_time_total or event.self_cpu_time_total)
        groups[group_of(event, closures)] += spent
        operations[event.name] += spent
    total = sum(groups.values()) or 1.0
    return {
        "groups": {name: groups[name] / total for name in (*GROUPS, "optimizer", REST)},
        "operations": {name: spent / total for name, spent in operations.most_common(8)},
    }


def group_of(event: Any, closures: Mapping[int, float]) -> str:
    """Returns the group of an operation; ``closures`` are those of :func:`_ends_of_closures`."""
    for group, names in GROUPS.items():
        if any(name in event.name for name in names):
            return group
    place = event
    while place is not None:
        for start, group in WITHIN.items():
            in_closure = event.time_range.start < closures.get(place.id, 0)
            if place.name.startswith(start) and not (in_closure and event is not place):
                return group
        place = place.cpu_parent
    return REST


def _ends_of_closures(events: Any) -> dict[int, float]:
    """Finds when forward and backward pass end in steps of an optimizer (Lightning), by ``id``."""
    ends: dict[int, float] = {}
    for event in events:
        if event.name.startswith("autograd::engine"):
            place = event.cpu_parent
            while place is not None:
                if place.name.startswith("Optimizer.step"):
                    ends[place.id] = max(ends.get(place.id, 0), event.time_range.end)
                place = place.cpu_parent
    return ends
