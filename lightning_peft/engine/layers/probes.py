"""Comparison of a layer's output before and after a change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.layers.expert_weights import ExpertWeight
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, LINEAR_LIKE


def probe_input(layer: Any) -> Tensor | None:
    """Returns a small input for ``layer``, the same in every call; ``None`` for other kinds.

    ``(4, in)`` for linear layers, ``(2, in, *size)`` for convolutions, and ids for embeddings.
    """
    stored = layer._parameters.get("weight")
    if stored is None:
        return None
    if isinstance(layer, nn.Embedding):
        return torch.arange(min(8, layer.num_embeddings), device=stored.device)
    if isinstance(layer, ExpertWeight):
        sizes = layer.weight_info()[0] if isinstance(layer, QuantizedLayer) else stored.shape
        shape: tuple[int, ...] = (4, sizes[1 if layer.is_transposed else 2])
    elif isinstance(layer, LINEAR_LIKE):
        width: Any = layer.nx if hasattr(layer, "nx") else layer.in_features
        shape = (4, width)
    elif isinstance(layer, CONVOLUTION_LIKE):
        spans = zip(layer.kernel_size, layer.dilation, strict=True)
        shape = (2, layer.in_channels, *(kernel * dilation + 2 for kernel, dilation in spans))
    else:
        return None
    dtype = layer.weight_info()[1] if isinstance(layer, QuantizedLayer) else stored.dtype
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(stored.device, dtype)


@contextmanager
def in_eval_mode(layer: nn.Module) -> Iterator[None]:
    """Within the body there is no dropout."""
    modes = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def rounding_tolerance(layer: nn.Module, dtype: torch.dtype) -> float:
    """Which relative difference of outputs may be rounding."""
    coarse = torch.bfloat16 if isinstance(layer, QuantizedLayer) else dtype
    return float(max(torch.finfo(coarse).eps, torch.finfo(dtype).eps) ** 0.5)
