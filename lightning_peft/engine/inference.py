"""Optimized layers for generation with few rows per step.

For so few rows, dequantizing a 4-bit weight takes longer than the product with it, and scaling and
casting an adapter longer than the two products with it; all of that is the same for every token and
is done once, with the same numbers bit for bit. What remains is the cost of each call. So for one
16-bit row, layers that get the same input, such as the three projections of attention, lie in
one matrix with their ``A`` below them: two products instead of nine. Now and then a number of these
differs in its last bit. Folding adapters into the copies would save the second product, but round
away a part of them, and change greedy answers. What is stored is only read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.compat.torch import version_of
from lightning_peft.engine.backends.layers import QuantizedLinear, output_dtype
from lightning_peft.engine.layers.dora import DoraLayer
from lightning_peft.engine.layers.fused import FrozenMatmul, frozen_matmul, is_transformed
from lightning_peft.engine.layers.kinds import as_rows
from lightning_peft.engine.layers.lora import LoraLinear
from lightning_peft.engine.layers.mixin import stored_parameter

_BITS_16 = (torch.bfloat16, torch.float16)


def inference_bytes(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Returns the bytes that :func:`ready_for_inference` takes with copies; 0 within its body."""
    size = 0
    for layer in _copied(module):
        shape, own = layer.weight_info()
        computed = getattr(layer, "compute_dtype", None) or dtype or own
        if isinstance(layer, QuantizedLinear) or computed in _BITS_16:
            size += shape.numel() * computed.itemsize
    return size


@contextmanager
def ready_for_inference(module: nn.Module, copies: bool = True) -> Iterator[None]:
    """Within the body, what each token would compute again is computed once.

    Adapters must not change meanwhile. Where gradients are wanted, layers compute as usual. Within
    another such body nothing happens: the outer one decides on copies.

    Args:
        module: A module with adapted or quantized layers.
        copies: Keep dequantized weights, and weights that are multiplied together in one matrix.
    """
    copied = set(_copied(module))
    quantized = [layer for layer in copied if isinstance(layer, QuantizedLinear)]
    observer = _Observer()
    scaled: list[Any] = [layer for layer in module.modules() if isinstance(layer, DoraLayer)]
    adapted: list[Any] = [layer for layer in module.modules() if _is_adapted(layer)]
    try:
        for layer in quantized:
            # ``None`` on the layer itself: decided to have none.
            layer.dense_copies = {} if copies else None
        for layer in adapted:
            together = copies and layer in copied
            layer.__dict__["forward"] = _ReadyForward(layer, observer if together else None)
        for layer in scaled:
            layer.kept_factors = {}
        yield
    finally:
        for layer in scaled:
            layer.__dict__.pop("kept_factors", None)
        for layer in adapted:
            layer.__dict__.pop("forward", None)
        for layer in quantized:
            layer.__dict__.pop("dense_copies", None)


def _is_adapted(layer: nn.Module) -> bool:
    # A forward pass on the object is someone's who changed it, or of an outer body.
    return _is_plain(layer) and "forward" not in layer.__dict__


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, LoraLinear) and not isinstance(layer, DoraLayer)


def _copied(module: nn.Module) -> list[Any]:
    """Returns the layers whose weights are copied."""
    found: list[Any] = []
    children: Any = module.modules()
    for layer in children:
        quantized = isinstance(layer, QuantizedLinear)
        if not (quantized or _is_plain(layer)) or "forward" in layer.__dict__:
            continue
        device = stored_parameter(layer).device
        if not quantized and device.type == "cpu":
            found.append(layer)
        elif quantized and "dense_copies" not in layer.__dict__:
            found += [layer] if layer.backend.multiplies_dequantized(device) else []
    return found


class _Ready(NamedTuple):
    """What a layer computes with alone.

    Attributes:
        frozen: The product with the frozen weight.
        bias: ``(out,)`` or ``None``.
        down: Scaled ``A``, ``(r, in)``; ``None`` without an adapter.
        up: ``B`` as ``(r, out)``.
    """

    frozen: FrozenMatmul
    bias: Tensor | None
    down: Tensor | None = None
    up: Any = None


class _ReadyForward:
    """The forward pass of an adapted layer while its adapters do not change."""

    def __init__(self, layer: Any, observer: _Observer | None) -> None:
        self.layer, self.observer = layer, observer
        self.group: _Group | None = None
        self.place = 0
        self._alone: dict[Any, _Ready | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output that the layer's class gives."""
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or torch.is_grad_enabled() or is_transformed():
            return self._usual(*args, **kwargs)
        if self.observer is not None:
            if self.group is None:
                self.observer.note(self, x)
            elif x.numel() == x.shape[-1]:
                together = self.group.output(self.place, x)
                if together is not None:
                    return together
        key = (output_dtype(x), x.dtype, x.device, self.layer.training, self.names())
        if key not in self._alone:
            self._alone[key] = self.make_ready(x)
        ready = self._alone[key]
        if ready is None:
            return self._usual(x)
        rows = x.to(key[0]).reshape(-1, x.shape[-1])
        out = ready.frozen.matmul(rows, self.layer.stored_weight(), ready.bias)
        if ready.down is not None:
            out.addmm_(rows @ ready.down.t(), ready.up)
        return out.view(*x.shape[:-1], out.shape[-1])

    def names(self) -> tuple[Any, ...]:
        """What decides which adapters take part."""
        layer = self.layer
        return layer.disable_adapters, layer.active_adapters, layer.merged_adapters

    def make_ready(self, x: Tensor) -> _Ready | None:
        """Returns the tensors of the layer for ``x``; ``None`` where it computes as usual."""
        layer = self.layer
        names = layer.effective_adapters()
        frozen = frozen_matmul(layer, names, x)
        dropping = any(layer.lora_dropout[name].training for name in names)
        if frozen is None or dropping or frozen.compute != frozen.dtype:
            return None
        dtype, bias = frozen.dtype, None if layer.bias is None else layer.bias.to(frozen.dtype)
        if not names:
            return _Ready(frozen, bias)
        a, b = layer.factors(names[0])
        scaled = (a * layer.adapter_settings[names[0]].scaling).to(dtype)
        return _Ready(frozen, bias, scaled, b.to(dtype, copy=True).t())

    def _usual(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = type(self.layer).forward(self.layer, *args, **kwargs)
        return output


class _Observer:
    """Finds layers that are called one after the other with the same tensor."""

    def __init__(self) -> None:
        self._seen: list[_ReadyForward] = []
        self._x: Tensor | None = None

    def note(self, forward: _ReadyForward, x: Tensor) -> None:
        """Notes a call; the layers of the input before become a group."""
        if x is not self._x or forward in self._seen:
            _Group(self._seen)
            self._seen, self._x = [], x
        self._seen.append(forward)


class _Group:
    """Layers that get the same input, computed with the call of the first."""

    def __init__(self, forwards: Sequence[_ReadyForward]) -> None:
        self.forwards = list(forwards)
        self._matrices: dict[torch.dtype, Tensor] = {}
        self._key: Any = None
        self._product: _Product | None = None
        self._x: Tensor | None = None
        self._changes = 0
        self._outputs: Sequence[Tensor | None] = [None] * len(self.forwards)
        for place, forward in enumerate(self.forwards):
            forward.group, forward.place = self, place

    def output(self, place: int, x: Tensor) -> Tensor | None:
        """Returns the output of the layer at ``place``, or ``None`` where it computes alone."""
        if place == 0:
            self._x, self._changes = x, version_of(x)
            self._outputs = self._all_outputs(x)
        elif x is not self._x or version_of(x) != self._changes:
            # Not this time: from now on each by itself.
            self._x, self._outputs = None, [None] * len(self.forwards)
            for one in self.forwards:
                _Group([one])
            return None
        output = self._outputs[place]
        if place == len(self.forwards) - 1:
            self._x, self._outputs = None, ()
        return output

    def _all_outputs(self, x: Tensor) -> Sequence[Tensor | None]:
        dtype = output_dtype(x)
        key = (dtype, x.dtype, [forward.names() for forward in self.forwards])
        if key != self._key:
            self._product = self._make_product(x, dtype)
            self._key = key
        if self._product is None:
            return [None] * len(self.forwards)
        return self._product.outputs(x, dtype)

    def _make_product(self, x: Tensor, dtype: torch.dtype) -> _Product | None:
        ready = [forward.make_ready(x) for forward in self.forwards]
        known = [one for one in ready if one is not None]
        if len(known) < len(ready) or dtype not in _BITS_16:
            return None
        layers = [forward.layer for forward in self.forwards]
        sizes = [layer.weight_info()[0].numel() // x.shape[-1] for layer in layers]
        if dtype not in self._matrices:
            ranks = [max(one.r for one in layer.adapter_settings.values()) for layer in layers]
            matrix = x.new_empty(sum(sizes) + sum(ranks), x.shape[-1], dtype=dtype)
            for layer, place in zip(layers, matrix[: sum(sizes)].split(sizes), strict=True):
                _fill(layer, place)
            self._matrices[dtype] = matrix
        downs = [one.down for one in known if one.down is not None]
        used = sum(sizes) + sum(map(len, downs))
        matrix = self._matrices[dtype][:used]
        if downs:
            torch.cat(downs, out=matrix[sum(sizes) :])
        bias = None
        if any(one.bias is not None for one in known):
            parts = zip(known, sizes, strict=True)
            biases = [matrix.new_zeros(n) if one.bias is None else one.bias for one, n in parts]
            bias = torch.cat([*biases, matrix.new_zeros(used - sum(sizes))])
        up = None
        if downs:
            shapes = zip(known, sizes, strict=True)
            ups = [x.new_zeros(0, n) if one.up is None else one.up for one, n in shapes]
            up = torch.block_diag(*ups).to(dtype)
        return _Product(matrix, bias, sizes, up)


def _fill(layer: Any, place: Tensor) -> None:
    stored = layer.stored_weight()
    if not isinstance(layer, QuantizedLinear):
        place.copy_(as_rows(layer, stored))
        return
    place.copy_(layer.backend.dequantize(stored, place.dtype))
    assert layer.dense_copies is not None
    layer.dense_copies[place.dtype] = place


class _Product(NamedTuple):
    """One product for the layers of a group.

    Attributes:
        matrix: Their weights, and below them their scaled ``A``; ``(rows, in)``.
        bias: ``(rows,)`` or ``None``.
        sizes: Rows of each layer.
        up: The ``B`` of all, ``(r, out)`` each, on the diagonal; ``None`` without adapters.
    """

    matrix: Tensor
    bias: Tensor | None
    sizes: list[int]
    up: Tensor | None

    def outputs(self, x: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """Returns the outputs of the layers for one row, ``(1, ..., in)``."""
        # As few operations as can be: each takes as long as the product with an adapter.
        rows = F.linear(x.to(dtype).view(1, -1), self.matrix, self.bias)
        if self.up is not None:
            rank, width = self.up.shape
            low = rows.narrow(1, width, rank)
            rows = rows.narrow(1, 0, width).addmm_(low, self.up)
        rows = rows.view(*x.shape[:-1], -1)
        return (rows,) if len(self.sizes) == 1 else rows.split_with_sizes(self.sizes, -1)
