"""Layers whose weight shape differs from their declared sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, TRANSPOSED
from lightning_peft.engine.layers.mixin import LayerMixin
from lightning_peft.errors import LifecycleError, itemize

_ATTRIBUTES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
}


def refuse_uninitialized(parts: Mapping[str, nn.Module]) -> None:
    """Refuses lazy layers that have not seen a batch: their weights have no size yet."""
    names = [
        f"{name}.{key}" if name else key
        for name, part in parts.items()
        for key, tensor in (*part.named_parameters(), *part.named_buffers())
        if is_lazy(tensor)
    ]
    if names:
        raise LifecycleError(
            "Adapters need weights, and lazy layers get theirs with the first batch:"
            + itemize(names, 5)
            + "\nRun the module on one batch in `__init__` or `configure_model`, under "
            "torch.no_grad()."
        )


def mismatched_shapes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the shape that ``layer`` says its weight has and the one it has, where they differ.

    ``None`` also where that cannot be known: for packed weights of other libraries, for weights
    without a shape yet, and for transformers' ``Conv1D``, which says only one size.
    """
    weight = layer._parameters.get("weight")
    if weight is None or is_lazy(weight):
        return None
    if isinstance(layer, LayerMixin):
        stored = tuple(layer.weight_info()[0])
    elif weight.is_floating_point():
        stored = tuple(weight.shape)
    else:
        return None
    declared = _declared(layer)
    return None if declared is None or declared == stored else (declared, stored)


def _declared(layer: Any) -> tuple[int, ...] | None:
    for kind, names in _ATTRIBUTES.items():
        if isinstance(layer, kind):
            return tuple(getattr(layer, name) for name in names)
    if not isinstance(layer, CONVOLUTION_LIKE):
        return None
    first, second = layer.out_channels, layer.in_channels
    if isinstance(layer, TRANSPOSED):
        first, second = second, first
    return (first, second // layer.groups, *layer.kernel_size)


@contextmanager
def weight_sizes(layer: Any) -> Iterator[None]:
    """Within the body, a linear layer or embedding says the sizes that its weight has."""
    shapes = mismatched_shapes(layer)
    kind = next((kind for kind in _ATTRIBUTES if isinstance(layer, kind)), None)
    if shapes is None or kind is None:
        yield
        return
    names, (declared, stored) = _ATTRIBUTES[kind], shapes
    try:
        for name, size in zip(names, stored, strict=True):
            setattr(layer, name, size)
        yield
    finally:
        for name, size in zip(names, declared, strict=True):
            setattr(layer, name, size)


def shape_unsupported_reason(layer: Any, in_place: bool) -> str | None:
    """Why the shape of a weight is in the way of an adapter, or ``None``."""
    shapes = mismatched_shapes(layer)
    if shapes is None or (in_place and not isinstance(layer, CONVOLUTION_LIKE)):
        return None
    return (
        f"its weight was replaced by one of shape {shapes[1]}, and the layer says that it is "
        f"{shapes[0]}, by which adapters are made. Make a new {type(layer).__name__} of that size, "
        "or leave it out by `exclude_modules`"
    )
