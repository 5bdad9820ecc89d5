"""Kinds of adaptable layers, and the use of their weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.compat.torch import (
    CONVOLUTION_FORWARD,
    ConvNd,
    ConvTransposeNd,
    convolution_padding,
)
from lightning_peft.engine.layers.expert_weights import ExpertWeight
from lightning_peft.engine.layers.mixin import class_key

LINEAR_LIKE = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION_LIKE = (*CONVOLUTIONS, *TRANSPOSED)
ADAPTABLE = (*LINEAR_LIKE, *CONVOLUTION_LIKE, nn.Embedding)

# Whose code is known to be the product with `weight` plus `bias` and nothing else.
_STANDARD = (*ADAPTABLE, ConvNd)
# Subclasses with a forward pass of their own that is this product, by full name.
_SAME_FORWARD = {"transformers.models.falcon.modeling_falcon.FalconLinear"}
# Subclasses of nn.Linear that return a tuple, which PEFT's wrapper of a layer cannot.
_ROUTERS = {
    "transformers.models.llama4.modeling_llama4.Llama4Router",
    "transformers.models.phimoe.modeling_phimoe.PhimoeTopKRouter",
}
_STANDARD_CODE = {
    vars(cls)[name]
    for cls in _STANDARD
    for name in ("forward", CONVOLUTION_FORWARD)
    if name in vars(cls)
}


def has_standard_forward(layer: nn.Module) -> bool:
    """Whether ``layer`` computes what its kind says.

    A subclass may pad, scale or standardize in a ``forward`` of its own: what an adapter adds to
    the weight is then another thing than what it adds to the output.
    """
    if getattr(layer, "standard_forward", False):
        return True
    if _full_class_name(layer) in _SAME_FORWARD:
        return True
    origin = class_key(layer)[2]
    code = [getattr(origin, name, None) for name in ("forward", CONVOLUTION_FORWARD)]
    return all(function is None or function in _STANDARD_CODE for function in code)


def is_router(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear one that returns a choice of experts."""
    return _full_class_name(layer) in _ROUTERS


def _full_class_name(layer: nn.Module) -> str:
    origin = class_key(layer)[2]
    return f"{origin.__module__}.{origin.__qualname__}"


def has_quantizable_class(layer: nn.Module) -> bool:
    """Whether the class of ``layer`` computes the product and nothing else.

    These are the classes of torch and transformers themselves, and subclasses of ``nn.Linear``
    from transformers' own models that keep its forward pass.
    """
    cls = type(layer)
    if cls in (*LINEAR_LIKE, *CONVOLUTION_LIKE) or isinstance(layer, ExpertWeight):
        return True
    if cls is nn.MultiheadAttention:
        # Else queries, keys and values have weights of their own.
        return layer._parameters["in_proj_weight"] is not None
    own = isinstance(layer, nn.Linear) and cls.__module__.startswith("transformers.models.")
    return own and has_standard_forward(layer)


def standard_class(layer: nn.Module) -> type[nn.Module]:
    """Returns the class of torch or transformers that ``layer`` is an instance of."""
    return next(cls for cls in ADAPTABLE if isinstance(layer, cls))


def as_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns ``weight`` as the matrix that is quantized: ``(out, in)``; a view.

    The kernel of a convolution is unfolded: ``(out, in * kernel)``, or ``(in, out * kernel)`` for
    transposed ones; the weights of experts are put on top of each other.
    """
    if isinstance(layer, Conv1D):
        return weight.t()
    if isinstance(layer, ExpertWeight):
        return weight.flatten(0, 1)
    return weight.flatten(1) if isinstance(layer, ConvNd) else weight


def from_rows(layer: Any, rows: Tensor) -> Tensor:
    """Returns the weight in the layout of the layer's class; the inverse of :func:`as_rows`."""
    if isinstance(layer, Conv1D):
        return rows.t()
    if isinstance(layer, ExpertWeight):
        return rows.view(layer.num_experts, -1, rows.shape[1])
    if isinstance(layer, ConvNd):
        ends = (layer.in_channels, layer.out_channels)
        first, second = ends if isinstance(layer, ConvTransposeNd) else ends[::-1]
        return rows.view(first, second // layer.groups, *layer.kernel_size)
    return rows


def pads_with_values(layer: Any) -> bool:
    """Whether a convolution sees anything but zeros outside of its input."""
    return layer.padding_mode != "zeros" and any(convolution_padding(layer))


def is_dilated(layer: Any) -> bool:
    """Whether the dilation of a convolution changes what it computes."""
    sizes = zip(layer.kernel_size, layer.dilation, strict=True)
    return any(kernel > 1 and dilation > 1 for kernel, dilation in sizes)
