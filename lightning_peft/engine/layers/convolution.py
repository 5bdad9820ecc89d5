"""Convolutions with a computed or quantized weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.compat.torch import (
    ConvTransposeNd,
    convolution_padding,
    is_functional,
    output_padding,
)

_DENSE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def convolve(
    layer: Any,
    input: Tensor,
    weight: Tensor,
    output_size: list[int] | None = None,
) -> Tensor:
    """Returns the output of ``layer`` with ``weight``, ungrouped and without a bias.

    Stride, padding with its mode, and dilation are the layer's.

    Args:
        layer: A convolution, transposed or not.
        input: ``(N, in, *size)`` or ``(in, *size)``.
        weight: ``(any, in, *kernel)``, or ``(in, any, *kernel)`` for transposed layers.
        output_size: As transposed layers take it.
    """
    spatial = len(layer.kernel_size)
    if isinstance(layer, ConvTransposeNd):
        return _TRANSPOSED[spatial](
            input,
            weight,
            None,
            layer.stride,
            layer.padding,
            output_padding(layer, input, output_size),
            1,
            layer.dilation,
        )
    input, padding = padded(layer, input)
    return _DENSE[spatial](input, weight, None, layer.stride, padding, layer.dilation)


def mix_channels(input: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Returns the convolution of ``input`` with a kernel of size one."""
    return _DENSE[weight.ndim - 2](input, weight, groups=groups)


def padded(layer: Any, input: Tensor) -> tuple[Tensor, Any]:
    """Returns ``input`` with the padding that the kernel cannot do itself, and what is left."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return input, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    outside = F.pad(input, convolution_padding(layer), mode=mode)
    return outside, (0,) * len(layer.kernel_size)


class FrozenConvolution(torch.autograd.Function):
    """A convolution whose weight exists only while it is used.

    Autograd would keep the dequantized weight until the backward pass, and with it all that 4 bits
    save. The weight is frozen, so the backward pass needs it once more and nothing else.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        weight: Callable[[], Tensor],
        geometry: tuple[Any, ...],
    ) -> Tensor:
        """Returns the convolution with what ``weight`` returns, in the dtype of the input."""
        ctx.weight, ctx.geometry = weight, geometry
        ctx.shape, ctx.with_bias = input.shape, bias is not None
        product: Tensor = torch.ops.aten.convolution(input, weight(), bias, *geometry)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Returns the gradient with respect to the input, and to a bias that is trained."""
        (gradient,) = gradients
        # Only its shape is looked at.
        stand_in = gradient.new_empty(1).expand(ctx.shape)
        wanted = (ctx.needs_input_grad[0], False, False)
        of_input, _, _ = torch.ops.aten.convolution_backward(
            gradient, stand_in, ctx.weight(), None, *ctx.geometry, wanted
        )
        of_bias = None
        if ctx.with_bias and ctx.needs_input_grad[1]:
            of_bias = gradient.sum((0, *range(2, gradient.ndim)))
        return of_input, of_bias, None, None


def frozen_convolution(
    layer: Any,
    input: Tensor,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
    output_size: list[int] | None = None,
) -> Tensor:
    """Returns the output of ``layer`` with the weight that ``weight`` returns when needed."""
    batched, geometry = convolution_geometry(layer, input, output_size)
    if is_functional():
        # `torch.func` does not go through autograd functions of one's own.
        product: Tensor = torch.ops.aten.convolution(batched, weight(), bias, *geometry)
    else:
        product = FrozenConvolution.apply(batched, bias, weight, geometry)
    return product if batched.ndim == input.ndim else product.squeeze(0)


def convolution_geometry(
    layer: Any, input: Tensor, output_size: list[int] | None = None
) -> tuple[Tensor, tuple[Any, ...]]:
    """Returns the input, batched and padded, and torch's arguments for the layer's convolution.

    These are stride, padding, dilation, transposed, output padding and groups.
    """
    spatial = len(layer.kernel_size)
    batched = input if input.ndim == spatial + 2 else input.unsqueeze(0)
    transposed = isinstance(layer, ConvTransposeNd)
    extra: Any = (0,) * spatial
    if transposed:
        padding = layer.padding
        extra = output_padding(layer, batched, output_size)
    else:
        batched, padding = padded(layer, batched)
    return batched, (layer.stride, padding, layer.dilation, transposed, extra, layer.groups)
