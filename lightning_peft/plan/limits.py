"""The largest batch and the longest sequence that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lightning_peft.plan.prediction import predict
from lightning_peft.plan.settings import Settings
from lightning_peft.plan.sources import Source

# Where the search ends, and how fine it is for sequences.
_LARGEST_BATCH, _LONGEST, _STEP = 4096, 1 << 20, 64


def largest_batch(source: Source, settings: Settings, device_bytes: int) -> int:
    """Returns the most rows that fit at the sequence length of ``settings``; 0 where none do.

    Args:
        source: The model.
        settings: The run.
        device_bytes: Memory of the device.
    """

    def needed(rows: int) -> int:
        return predict(source, replace(settings, batch_size=rows)).high_bytes

    return _largest(needed, device_bytes, settings.batch_size, _LARGEST_BATCH, 1)


def longest_sequence(source: Source, settings: Settings, device_bytes: int) -> int:
    """Returns the longest sequence that fits at the batch size of ``settings``; 0 where none does.

    In steps of 64 tokens, and at most as long as the model was made for.
    """

    def needed(length: int) -> int:
        return predict(source, replace(settings, seq_len=length)).high_bytes

    limit = source.longest or _LONGEST
    return _largest(needed, device_bytes, settings.seq_len, limit, min(_STEP, limit))


def _largest(
    needed: Callable[[int], int], device_bytes: int, start: int, limit: int, step: int
) -> int:
    """Returns the largest multiple of ``step``, up to ``limit``, whose need fits.

    Memory grows about evenly with rows, and a little faster with length, so the straight line
    through the two latest points nearly meets the answer. Two guesses are the rule.
    """
    known: dict[int, int] = {}

    def need(count: int) -> int:
        if count not in known:
            known[count] = needed(count * step)
        return known[count]

    most = max(1, limit // step)
    fitting, failing = 0, most + 1
    older, newer = 1, min(most, max(2, start // step))
    for count in dict.fromkeys((older, newer)):
        if need(count) <= device_bytes:
            fitting = max(fitting, count)
        else:
            failing = min(failing, count)
    while failing - fitting > 1:
        slope = (need(newer) - need(older)) / max(1, newer - older)
        guess = newer + (device_bytes - need(newer)) / slope if slope > 0 else failing - 1
        count = min(max(int(guess), fitting + 1), failing - 1)
        if need(count) <= device_bytes:
            fitting = count
        else:
            failing = count
        older, newer = sorted((newer, count))
    return fitting * step
