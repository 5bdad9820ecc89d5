"""Selective activation checkpointing within a memory budget.

A pass is everything from the first call of a block until the backward pass has released the
activations of all calls. The first pass of a size keeps only the inputs of blocks and measures, for
each call, what it would keep otherwise. Later passes that are not larger know enough: they take
from as few calls as possible what is computed again at little cost, and if that does not do, keep
of as few calls as possible their inputs only. The first blocks of a model come first in this: when
backward reaches them, the activations of the others are gone, and there is room.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.torch import (
    StorageWeakRef,
    saved_tensors_hooks_in_use,
    storage_key,
    tree_leaves,
)
from lightning_peft.engine.layers.mixin import class_key
from lightning_peft.engine.training.rematerialization import (
    BlockCall,
    OpRecorder,
    SavedTensor,
    unpack,
)
from lightning_peft.errors import ConfigError, UnsupportedError

log = logging.getLogger(__name__)

SAVE_ALL, SELECTIVE, FULL = "saved in full", "selective", "full recompute"
_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", re.IGNORECASE)
Shape = tuple[str, tuple[tuple[int, ...], ...]]


def read_budget(value: Any) -> int | float | None:
    """The memory limit in ``gradient_checkpointing``.

    Returns:
        Bytes, a share between 0 and 1, or ``None`` where it is ``True``, ``False`` or ``"auto"``.
    """
    if value is True or value is False or value == "auto":
        return None
    if isinstance(value, float) and 0 < value < 1:
        return value
    found = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if found is not None:
        number, prefix, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** _UNITS[prefix.upper()])
        if size:
            return size
    raise ConfigError(
        f"gradient_checkpointing={value!r}: it is True, False, 'auto', or how much the blocks may "
        "keep for the backward pass: an amount such as '2GB' or '512MiB', or a share of everything "
        "between 0 and 1 such as 0.5."
    )


@dataclass(frozen=True)
class BlockSizes:
    """One call of a block, as it was measured.

    Attributes:
        shape: Class of the block and shapes of its inputs.
        save_all: Bytes that it keeps by itself.
        selective: Bytes without what is cheap to compute again.
        full: Bytes of the inputs.
    """

    shape: Shape
    save_all: int
    selective: int
    full: int

    def of(self, level: str) -> int:
        """Bytes kept at a level."""
        return {SAVE_ALL: self.save_all, SELECTIVE: self.selective, FULL: self.full}[level]

    def covers(self, shape: Shape) -> bool:
        """Whether a call is of the same kind and not larger."""
        kind, sizes = self.shape
        return (
            kind == shape[0]
            and len(sizes) == len(shape[1])
            and all(
                len(known) == len(size) and all(a >= b for a, b in zip(known, size, strict=True))
                for known, size in zip(sizes, shape[1], strict=True)
            )
        )


def choose_levels(calls: list[BlockSizes], max_bytes: float) -> list[str]:
    """Returns a level for each call so that together they keep at most ``max_bytes`` bytes.

    Where that is impossible, the levels that keep least.
    """
    levels, total = [SAVE_ALL] * len(calls), sum(call.save_all for call in calls)
    for level in (SELECTIVE, FULL):
        for index, call in enumerate(calls):
            gain = call.of(levels[index]) - call.of(level)
            if total > max_bytes and gain > 0:
                levels[index], total = level, total - gain
    # What the last step gave too much.
    for index in reversed(range(len(calls))):
        loss = calls[index].save_all - calls[index].of(levels[index])
        if levels[index] == SELECTIVE and total + loss <= max_bytes:
            levels[index], total = SAVE_ALL, total + loss
    return levels


class ActivationBudget:
    """Decides for each call of a block what of it is kept."""

    def __init__(self, setting: Any, notify: Callable[[str], None] | None = None) -> None:
        self.setting, self.notify = setting, notify
        limit = read_budget(setting)
        assert limit is not None
        self.limit = limit
        self._plans: dict[Any, list[BlockSizes]] = {}
        self._calls: list[BlockSizes] = []
        self._levels: list[str] = []
        self._seen: dict[int, Any] = {}
        self._alive = self._index = self._reported = self._inputs = 0
        self._is_first = True

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a module measures for itself, and reports nothing.
        return type(self), (self.setting,)

    def max_bytes(self, calls: list[BlockSizes]) -> float:
        """Returns the budget in bytes."""
        everything = sum(call.save_all for call in calls)
        return self.limit * everything if isinstance(self.limit, float) else self.limit

    def run(
        self,
        block: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs_only: Callable[..., Any],
    ) -> Any:
        """Calls a block.

        ``inputs_only`` calls it in the way that keeps its inputs only. Its last argument is
        something to keep with them and, or ``None``, a context for the forward pass.
        """
        leaves = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        shape = (class_key(block)[2].__name__, tuple(tuple(leaf.shape) for leaf in leaves))
        if not self._alive:
            self._begin(shape)
        index, self._index = self._index, self._index + 1
        known = index < len(self._calls) and self._calls[index].covers(shape)
        level = self._levels[index] if known and index < len(self._levels) else FULL
        self._alive += 1
        call = BlockCall(self._ended)
        if level == FULL:
            context = None if known else self._measuring(index, shape, block, leaves, call)
            return inputs_only(block, forward, args, kwargs, (call, context))
        if level == SELECTIVE:
            recorder = OpRecorder(call, _weights(block))
            with torch.autograd.graph.saved_tensors_hooks(recorder.pack, unpack), recorder:
                output = forward(*args, **kwargs)
            recorder.decide()
            return output
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: SavedTensor(saved, call), unpack
        ):
            return forward(*args, **kwargs)

    def _ended(self) -> None:
        self._alive -= 1

    def _begin(self, shape: Shape) -> None:
        self._index, self._inputs, self._seen = 0, 0, {}
        self._calls = self._plans.setdefault(_rounded(shape), [])
        self._levels = []
        if not self._calls:
            return
        max_bytes = self.max_bytes(self._calls)
        self._levels = choose_levels(self._calls, max_bytes)
        kept = sum(c.of(level) for c, level in zip(self._calls, self._levels, strict=True))
        if kept > max_bytes:
            self._too_small(kept, max_bytes)
        self._is_first = False
        self._report(kept)

    def _report(self, kept: int) -> None:
        everything = sum(call.save_all for call in self._calls)
        if everything <= self._reported or self.notify is None:
            return
        self._reported = everything
        counts = Counter(self._levels)
        how = [
            f"{count} block{'s' if count > 1 else ''} {level}"
            for level in (SAVE_ALL, SELECTIVE, FULL)
            if (count := counts[level])
        ]
        self.notify(
            f"gradient_checkpointing={self.setting!r}: saved activations: {_readable(kept)} of "
            f"{_readable(everything)} ({', '.join(how)})."
        )

    def _too_small(self, least: float, max_bytes: float) -> None:
        message = (
            f"gradient_checkpointing={self.setting!r}: the inputs of the blocks alone are "
            f"{_readable(least)}, and the blocks may keep {_readable(max_bytes)}. Allow more, or "
            "make the batch or its rows smaller."
        )
        if self._is_first:
            raise UnsupportedError(message)
        # Hours into a run: continue with the least that is possible.
        if self._reported < least:
            self._reported = int(least)
            log.warning("%s This batch keeps the least that is possible.", message)

    @contextmanager
    def _measuring(
        self, index: int, shape: Shape, block: nn.Module, leaves: list[Tensor], call: BlockCall
    ) -> Iterator[None]:
        """Within the forward pass of a call whose inputs are kept: measures what it saves."""
        recorder = OpRecorder(call, _weights(block))
        hooks = saved_tensors_hooks_in_use()
        assert hooks is not None
        outer_pack, outer_unpack = hooks

        def pack(saved: Tensor) -> Any:
            recorder.record_saved(saved)
            return outer_pack(saved)

        with torch.autograd.graph.saved_tensors_hooks(pack, outer_unpack), recorder:
            yield
        save_all = dict(recorder.saved)
        recorder.decide()
        given = {}
        for leaf in leaves:
            storage = leaf.untyped_storage()
            given[storage_key(storage)] = storage.nbytes()
        new = [
            sum(size for key, size in one.items() if key not in self._seen)
            for one in (save_all, recorder.kept, given)
        ]
        # References, so that no key is used again during the pass.
        references = [StorageWeakRef(leaf.untyped_storage()) for leaf in leaves]
        self._seen.update((reference.cdata, reference) for reference in references)
        self._enter(index, BlockSizes(shape, *new))

    def _enter(self, index: int, sizes: BlockSizes) -> None:
        self._inputs += sizes.full
        if self._is_first and isinstance(self.limit, int) and self._inputs > self.limit:
            self._too_small(self._inputs, self.limit)
        if index < len(self._calls):
            known = self._calls[index]
            if sizes.covers(known.shape) or not _alike(known.shape, sizes.shape):
                self._calls[index] = sizes
            else:
                self._calls[index] = _larger(known, sizes)
        elif index == len(self._calls):
            self._calls.append(sizes)


def _alike(one: Shape, other: Shape) -> bool:
    return one[0] == other[0] and [len(s) for s in one[1]] == [len(s) for s in other[1]]


def _larger(one: BlockSizes, other: BlockSizes) -> BlockSizes:
    """Returns a call that covers two of the same kind, of which each is larger in something."""
    pairs = zip(one.shape[1], other.shape[1], strict=True)
    shape = tuple(tuple(map(max, zip(a, b, strict=True))) for a, b in pairs)
    most = (
        math.ceil(max(call.of(level) * _growth(call, shape) for call in (one, other)))
        for level in (SAVE_ALL, SELECTIVE, FULL)
    )
    return BlockSizes((one.shape[0], shape), *most)


def _growth(call: BlockSizes, shape: tuple[tuple[int, ...], ...]) -> float:
    """Returns by how much a call of other inputs keeps more.

    With the square of what the inputs grow by, attention is covered.
    """
    pairs = zip(shape, call.shape[1], strict=True)
    return max(math.prod(new) / max(1, math.prod(old)) for new, old in pairs) ** 2


def _rounded(shape: Shape) -> Shape:
    """Returns a key that sizes share which differ by up to a quarter."""
    return shape[0], tuple(tuple(map(_rounded_up, size)) for size in shape[1])


def _rounded_up(size: int) -> int:
    step = max(1, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


def _weights(block: nn.Module) -> set[int]:
    """Returns the keys of storages that are there whether or not they are saved."""
    tensors = [*block.parameters(), *block.buffers()]
    return {storage_key(tensor.untyped_storage()) for tensor in tensors}


def _readable(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
