"""Largest batch and longest sequence that fit.

Memory grows evenly with rows, and evenly or faster with length (attention masks), so it is convex:
beyond two known points it is never below the straight line through them. Few runs need a trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_peft.plan.prediction import Prediction, predict
from lightning_peft.plan.sources import ModelSource

# Where the search ends, and how fine it is for sequences.
_LARGEST_BATCH, _LONGEST, _STEP = 4096, 1 << 20, 64


def largest_batch(source: ModelSource, plan: Prediction, device_bytes: int) -> int:
    """Returns the most rows that fit at the sequence length of a run; 0 where none do."""

    def needed(rows: int) -> int:
        return predict(source, replace(plan.settings, batch_size=rows)).high_bytes

    known = {plan.settings.batch_size: plan.high_bytes}
    return _largest(needed, known, device_bytes, _LARGEST_BATCH)


def longest_sequence(source: ModelSource, plan: Prediction, device_bytes: int) -> int:
    """Returns the longest sequence that fits at the batch size of a run; 0 where none does.

    In steps of 64 tokens, and at most as long as the model was made for.
    """
    limit = source.longest or _LONGEST
    step = min(_STEP, limit)

    def needed(count: int) -> int:
        return predict(source, replace(plan.settings, seq_len=count * step)).high_bytes

    known = {}
    if plan.settings.seq_len % step == 0 and plan.settings.seq_len <= limit:
        known = {plan.settings.seq_len // step: plan.high_bytes}
    return step * _largest(needed, known, device_bytes, limit // step)


def _largest(
    needed: Callable[[int], int], known: dict[int, int], device_bytes: int, most: int
) -> int:
    """Returns the largest count up to ``most`` whose need, which is convex, fits; 0 where none."""
    known = {count: size for count, size in known.items() if count <= most}
    if not known:
        known[1] = needed(1)
    if 1 not in known and min(known.values()) > device_bytes:
        known[1] = needed(1)
    if len(known) == 1:
        other = min(most, 2 * max(known))
        known[other] = needed(other)
    nearby = True
    while True:
        low, high = _bounds(known, device_bytes, most)
        if high - low <= 1:
            return low
        # Where memory grows evenly the answer is at one of the bounds, else between them.
        edge = high - 1 if max(known.values()) <= device_bytes else low + 1
        count = edge if nearby else (low + high) // 2
        nearby = not nearby
        known[count] = needed(count)


def _bounds(known: dict[int, int], device_bytes: int, most: int) -> tuple[int, int]:
    """Returns a count that fits for sure (0 for none), and one that does not."""
    fitting = sorted(count for count, size in known.items() if size <= device_bytes)
    failing = [count for count in known if count not in fitting]
    low, high = max(fitting, default=0), min(failing, default=most + 1)
    if fitting and failing:
        # Between the two, the need is at most the line.
        slope = (known[high] - known[low]) / (high - low)
        inside = low + int((device_bytes - known[low]) / slope)
        low, last = min(max(low, inside), high - 1), low
    else:
        last = low
    if len(fitting) > 1:
        # Beyond the two, it is at least the line.
        before = fitting[-2]
        slope = (known[last] - known[before]) / (last - before)
        if slope > 0:
            high = min(high, last + int((device_bytes - known[last]) / slope) + 1)
    return low, high
