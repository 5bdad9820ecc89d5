"""``W x + s B A x`` as one autograd function.

Autograd left to itself keeps the dropped input of every adapter besides the input, and adds up two
outputs and two input gradients that can be accumulated into one. Here the low-rank products come
first and go into the result of the large one, in the dtype of the activations over float32
adapters; a 4-bit weight is dequantized once in each direction; and only the input, what dropout
kept of it, and the ``r`` numbers per row between ``A`` and ``B`` wait for the backward pass.

What :func:`fused_output` does not cover is left to :mod:`.lora`, which gives the same numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.compat.torch import has_hooks, is_functional, unsafe_view
from lightning_peft.engine.backends.layers import QuantizedLayer, output_dtype
from lightning_peft.engine.layers.kinds import LINEAR_LIKE, as_rows, has_standard_forward
from lightning_peft.engine.layers.mixin import LayerMixin
from lightning_peft.engine.layers.operation_contexts import paused_recording, without_autocast

# Integers as wide as a dtype: multiplied by a mask, they give the number itself or zero.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS_16 = (torch.float16, torch.bfloat16)
# So many rows are converted to float32 at a time: they stay in the cache of a CPU.
_ROWS = 512
_SUPPORTED: dict[type, bool] = {}


class FrozenMatmul(NamedTuple):
    """How the frozen weight takes part.

    Attributes:
        layer: The layer.
        dtype: What the result and the adapters are computed in.
        compute: What the product with the frozen weight is computed in.
        quantized: The stored weight, where it is quantized. What autograd saved may be a plain
            tensor of the same values.
    """

    layer: Any
    dtype: torch.dtype
    compute: torch.dtype
    quantized: Any

    def matmul(self, rows: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        """Returns ``rows @ W.T + bias`` for ``rows`` of shape ``(n, in)``; a new tensor."""
        rows = rows.to(self.compute)
        bias = None if bias is None else bias.to(self.compute)
        if self.quantized is None:
            return F.linear(rows, self.weight(stored), bias)
        product: Tensor = self.layer.product(rows, self.quantized, bias)
        return product.to(self.dtype)

    def weight(self, stored: Tensor) -> Tensor:
        """Returns the weight as ``(out, in)`` in the dtype that it is multiplied in."""
        if self.quantized is None:
            return as_rows(self.layer, stored).to(self.compute)
        weight: Tensor = self.layer.backend.dequantize(self.quantized, self.compute)
        return weight


def fused_output(layer: Any, names: list[str], args: Any, kwargs: Any) -> Tensor | None:
    """Returns the output of a linear layer with one adapter, or ``None`` where it is not covered.

    Not covered are several adapters at once, base weights that are trained, computed or 8-bit,
    classes with a forward pass of their own, dropout with hooks or of another kind,
    ``torch.compile``, ``torch.func`` and forward-mode differentiation.
    """
    x = args[0] if len(args) == 1 and not kwargs else None
    if x is None or len(names) != 1:
        return None
    dropout = layer.lora_dropout[names[0]]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return fused_product(layer, names[0], x, layer.bias, p)


def fused_product(
    layer: Any, name: str, x: Any, bias: Tensor | None = None, p: float = 0.0
) -> Tensor | None:
    """Returns the product with a weight and one adapter, or ``None`` where it is not covered.

    Args:
        layer: The layer.
        name: The adapter.
        x: ``(..., in)``.
        bias: ``(out,)`` or ``None``.
        p: Probability that dropout takes an input of the adapter away.
    """
    frozen = frozen_matmul(layer, [name], x)
    if frozen is None:
        return None
    a, b = layer.factors(name)
    scaling = layer.adapter_settings[name].scaling
    with without_autocast(x), paused_recording():
        out: Tensor = FusedLora.apply(x, a, b, bias, layer.stored_weight(), frozen, scaling, p)
    return out


class FusedLora(torch.autograd.Function):
    """The product with a frozen weight and one adapter, and its gradients.

    With ``G`` the gradient of the output, ``D`` the input after dropout and ``s`` the scaling: that
    of ``B`` is ``G^T (s A D)``, that of ``A`` is ``s (B^T G)^T D``, and that of the input is
    ``G W`` plus ``s (B^T G) A`` where dropout kept the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        stored: Tensor,
        frozen: FrozenMatmul,
        scaling: float,
        p: float,
    ) -> Tensor:
        """Returns the output, ``(..., out)``; arguments as of :func:`fused_product`."""
        mask = draw_mask(x, p) if p else None
        rows = _rows(x, frozen)
        out = frozen.matmul(rows, stored, bias)
        ctx.factor, ctx.frozen = scaling / (1 - p), frozen
        low = _project_down(rows, mask, a, ctx.factor)
        out.addmm_(low, b.to(out.dtype).t())
        # The input as it came: layers that share it keep one tensor, not a cast copy each.
        ctx.save_for_backward(x, mask, low, a, b, bias, stored)
        # No view, as autograd sees it: the output of a layer may be changed in place.
        shaped: Tensor = unsafe_view(out, [*x.shape[:-1], out.shape[-1]])
        return shaped

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Returns the gradients of input, ``A``, ``B`` and a bias that is trained."""
        x, mask, low, a, b, bias, stored = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        rows = _rows(x, ctx.frozen)
        for_x, for_a, for_b, for_bias = ctx.needs_input_grad[:4]
        with without_autocast(rows):
            if torch.is_grad_enabled():
                # For gradients of gradients: what was kept does not know where it came from.
                low = _project_down(rows, mask, a, ctx.factor)
            of_low = gradient @ b.to(gradient.dtype)
            of_x = of_a = of_b = of_bias = None
            if for_x:
                of_x = _input_gradient(ctx, gradient, of_low, mask, a, stored)
                of_x = of_x.view(x.shape).to(x.dtype)
            if for_a:
                of_a = _accumulated(of_low, _apply_mask(rows, mask), a.dtype) * ctx.factor
            if for_b:
                of_b = _accumulated(gradient, low, b.dtype)
            if for_bias:
                of_bias = gradient.sum(0, dtype=bias.dtype)
        return of_x, of_a, of_b, of_bias, *[None] * 4


def _accumulated(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``left.T @ right`` in ``dtype``, summed over the rows in float32 or more.

    Rounded to 16 bits, gradients of accumulated batches would differ from that of one batch by
    the rounding of each.
    """
    if torch.is_grad_enabled() or left.dtype not in _BITS_16 or dtype in _BITS_16:
        return (left.t() @ right).to(dtype)
    if left.device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads():
        return torch.mm(left.t(), right, out_dtype=torch.float32).to(dtype)
    if left.shape[1] > right.shape[1]:
        # With the wide one on the right, where it is read as it lies in memory.
        return _accumulated(right, left, dtype).t()
    total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float32)
    for some, others in zip(left.split(_ROWS), right.split(_ROWS), strict=True):
        total.addmm_(some.t().float(), others.float())
    return total.to(dtype)


def _input_gradient(
    ctx: Any, gradient: Tensor, of_low: Tensor, mask: Tensor | None, a: Tensor, stored: Tensor
) -> Tensor:
    frozen: FrozenMatmul = ctx.frozen
    of_x = (gradient.to(frozen.compute) @ frozen.weight(stored)).to(gradient.dtype)
    scaled = (a * ctx.factor).to(gradient.dtype)
    if mask is None:
        return of_x.addmm_(of_low, scaled)
    return of_x.add_(_apply_mask(of_low @ scaled, mask))


def _rows(x: Tensor, frozen: FrozenMatmul) -> Tensor:
    return x.to(frozen.dtype).reshape(-1, x.shape[-1])


def _project_down(rows: Tensor, mask: Tensor | None, a: Tensor, factor: float) -> Tensor:
    """Returns ``s A`` times what dropout kept, ``(n, r)``."""
    return _apply_mask(rows, mask) @ (a * factor).to(rows.dtype).t()


def draw_mask(x: Tensor, p: float) -> Tensor:
    """Returns where dropout keeps ``x``, from the random numbers that ``nn.Dropout`` would use."""
    if x.device.type == "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
    return torch.native_dropout(x, p, True)[1]


def _apply_mask(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``rows`` with zeros where ``mask``, of as many elements, is false."""
    if mask is None:
        return rows
    mask = mask.reshape(rows.shape)
    if torch.is_grad_enabled():
        return rows * mask
    # A product of a number and a truth value makes torch convert one element after the other.
    bits = rows.view(_BITS[rows.dtype.itemsize]) * mask.view(torch.uint8)
    return bits.view(rows.dtype)


def _frozen_matmul(layer: Any, stored: Any, x: Tensor) -> FrozenMatmul | None:
    """Returns how the weight takes part, or ``None`` where ``x`` does not fit it."""
    dtype, autocast = output_dtype(x), torch.is_autocast_enabled(x.device.type)
    if isinstance(layer, QuantizedLayer):
        frozen = FrozenMatmul(layer, dtype, layer.compute_dtype or dtype, stored)
        width = layer.backend.weight_info(stored)[0][1]
        known = {x.dtype, frozen.compute} <= layer.backend.compute_dtypes
        known = known and not layer.backend.rounds_input(stored)
    else:
        frozen = FrozenMatmul(layer, dtype, dtype, None)
        width = as_rows(layer, stored).shape[1]
        # Two dtypes without autocast are an error that torch words best.
        known = x.is_floating_point() and (autocast or x.dtype == stored.dtype)
    if autocast and x.dtype == torch.float64:
        # Which autocast leaves as it is.
        return None
    return frozen if known and x.shape[-1:] == (width,) and x.numel() else None


def frozen_matmul(layer: Any, names: list[str], x: Any) -> FrozenMatmul | None:
    """Returns how the frozen weight takes part, or ``None`` where :func:`fused_output` is none."""
    if len(names) > 1 or not isinstance(x, Tensor) or not _is_supported_class(type(layer), layer):
        return None
    stored = layer.stored_weight()
    standard = all(_has_standard_dropout(layer.lora_dropout[name]) for name in names)
    if is_transformed() or not standard or stored is None or stored.requires_grad:
        return None
    return _frozen_matmul(layer, stored, x)


def is_transformed() -> bool:
    """Whether more is asked of the computation than its values and gradients."""
    return torch.compiler.is_compiling() or is_functional()


def _is_supported_class(cls: type, layer: Any) -> bool:
    if cls not in _SUPPORTED:
        known = [m for m in layer.mixins if issubclass(m, LayerMixin)]
        backend = layer.backend if isinstance(layer, QuantizedLayer) else None
        overriding = [m for m in layer.mixins if "forward" in vars(m) and m not in known]
        _SUPPORTED[cls] = (
            isinstance(layer, LINEAR_LIKE)
            and has_standard_forward(layer)
            and len(known) == (1 if backend is None else 2)
            and (backend is None or backend.fuses_adapters)
            and not overriding
        )
    return _SUPPORTED[cls]


def _has_standard_dropout(dropout: Any) -> bool:
    if has_hooks(dropout):
        return False
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and 0 < dropout.p < 1)
