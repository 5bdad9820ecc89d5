"""Tracking of tensor memory by category.

A tensor's storage is counted from the operation that makes it until Python and autograd have let go
of it, which is what torch's allocators see. With fake tensors nothing is allocated for it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_peft import engine
from lightning_peft.compat.torch import (
    FakeTensor,
    TorchDispatchMode,
    item_operation,
    storage_key,
    tree_iter,
)

ACTIVATIONS, LOGITS, DEQUANTIZATION = "activations", "logits", "dequantization"

_HALVES = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution)


class MemoryTracker(TorchDispatchMode):
    """Within the body, every new storage is entered, and taken out when it is freed.

    Args:
        vocabulary: Size of the last dimension which distinguishes logits from other activations.
        padded: The answer to a module that tests whether a mask is all true. A padded batch needs a
            mask of ``length x length`` in attention, one that is not needs none.

    Attributes:
        live: Bytes now, by purpose.
        total: Their sum.
        peak: The largest sum so far.
        at_peak: Bytes at that moment, by purpose.
        products: Shapes and dtypes of the products of 16-bit matrices, each once.
    """

    def __init__(self, vocabulary: int | None = None, padded: bool = True) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.products: set[tuple[Any, ...]] = set()
        self._vocabulary, self._padded = vocabulary, padded
        self._entries: dict[int, tuple[str, int, Any]] = {}

    def enter(self, tensors: Iterable[Tensor], purpose: str) -> int:
        """Counts tensors under ``purpose``, or moves them there; returns their bytes."""
        return sum(self._enter(tensor, purpose, move=True) for tensor in tensors)

    def _enter(self, tensor: Tensor, purpose: str, move: bool) -> int:
        storage = tensor.untyped_storage()
        key, size = storage_key(storage), storage.nbytes()
        known = self._entries.get(key)
        if known is not None:
            if not move or known[0] == purpose:
                return 0
            self.live[known[0]] -= size
            self.live[purpose] += size
            self._entries[key] = (purpose, size, known[2])
            return size

        def freed(_: Any) -> None:
            entry = self._entries.pop(key)
            self.hold(entry[0], -entry[1])

        self._entries[key] = (purpose, size, weakref.ref(storage, freed))
        self.hold(purpose, size)
        return size

    def hold(self, purpose: str, size: int) -> None:
        """Counts ``size`` bytes more, or fewer, that are there from now on."""
        self.live[purpose] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def forget_peak(self) -> None:
        """Takes what is there now for the fullest moment so far."""
        self.peak, self.at_peak = self.total, dict(self.live)

    def _pass(self, purpose: str, size: int) -> None:
        """Counts what an operation holds only while it runs."""
        self.hold(purpose, size)
        self.hold(purpose, -size)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and enters what it made."""
        if func is item_operation:
            # Fake tensors have no values; no size in a training step should depend on one.
            return self._value(args[0])
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # Asked in half of all calls, and nothing is made.
            return args[0].fake_device
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            # Such as the tokens that have a label: it may be all of them.
            out = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor, self._purpose(func, tensor), move=False)
        workspace = engine.workspace_bytes(func, args, kwargs or {})
        if (workspace or func.overloadpacket in _PRODUCTS) and out.dtype in _HALVES:
            shapes = [(tuple(a.shape), a.stride()) for a in args if isinstance(a, Tensor)]
            self.products.add((func, *shapes))
        if workspace:
            self._pass(DEQUANTIZATION, workspace)
        return out

    def _value(self, tensor: Tensor) -> Any:
        if tensor.dtype == torch.bool:
            return not self._padded
        return 1.0 if tensor.is_floating_point() else 1

    def _purpose(self, func: Any, tensor: Tensor) -> str:
        if engine.is_dequantization(func):
            return DEQUANTIZATION
        if self._vocabulary and tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary:
            return LOGITS
        return ACTIVATIONS
