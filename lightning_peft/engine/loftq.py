"""LoftQ, after Li et al. 2023 (arXiv 2310.08659), on any device.

The weight is split into what its codes stand for and a low-rank product, by quantizing and singular
value decomposition in turns. The numbers are PEFT's where the quantizer is its own, NF4 without
double quantization; where the layer is quantized afterwards, its own quantizer is used. PEFT leaves
the scaling of the adapter out: its numbers are for a scaling of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.engine.backends.registry import backend_for, quantization_config
from lightning_peft.engine.layers.kinds import as_rows, from_rows
from lightning_peft.engine.layers.mixin import stored_parameter


@torch.no_grad()
def loftq(layer: Any, made: Any, name: str, settings: dict[str, int], quantization: Any) -> None:
    """Initialises an adapter by LoftQ, and rewrites the dense weight of the layer.

    Args:
        layer: The layer.
        made: PEFT's layer with the factors of the adapter.
        name: The adapter.
        settings: PEFT's ``loftq_config``: ``loftq_bits`` and ``loftq_iter``.
        quantization: How the layer is quantized afterwards; ``None`` where it stays dense. Its
            weight is then what the codes stand for.
    """
    weight = stored_parameter(layer)
    # A decomposition of a large matrix takes minutes on a CPU and a second there.
    device = torch.device("cuda") if torch.cuda.is_available() else weight.device
    dense = as_rows(layer, weight.data).to(device)
    config = quantization or quantization_config(
        load_in_8bit=settings["loftq_bits"] == 8, bnb_4bit_use_double_quant=False
    )
    backend, rank = backend_for(config), made.r[name]
    rest = dense
    for step in range(settings["loftq_iter"]):
        codes = backend.quantize(rest.contiguous(), config, device)
        stands_for = backend.dequantize(codes, torch.float32)
        u, s, v = torch.linalg.svd(dense.float() - stands_for, full_matrices=False)
        a, b = balanced(u, s, v, rank)
        if step + 1 < settings["loftq_iter"]:
            rest = (dense.float() - b @ a).to(dense.dtype)
    factors = [getattr(made, kind)[name].weight for kind in ("lora_A", "lora_B")]
    for factor, value in zip(factors, (a, b), strict=True):
        value = value / made.scaling[name] ** 0.5
        factor.data = value.to(factor.device, torch.float32).contiguous()
    left = from_rows(layer, stands_for if quantization is None else rest)
    weight.data = left.to(weight.device, weight.dtype).contiguous()


def balanced(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B``, which share the first singular values ``s``; ``v`` has vectors as rows."""
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
