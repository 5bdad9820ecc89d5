"""bitsandbytes: undocumented state of its layers, parameters and optimizers."""

from __future__ import annotations

from typing import Any

import torch

from lightning_peft.compat.torch import compiled_late

with compiled_late():
    import bitsandbytes as bnb

from bitsandbytes import functional
from bitsandbytes.utils import unpack_tensor_to_dict as unpack_tensor_to_dict

# What the constructor of Linear4bit sets besides the parameters.
LINEAR4BIT_ATTRIBUTES = (
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
)


def prequantized(codes: torch.Tensor, **fields: Any) -> Any:
    """Returns the ``Params4bit`` of codes that are there already.

    Public alternative: ``Params4bit.from_prequantized``, which takes the constants as they are in
    a file, and computes them again.
    """
    return bnb.nn.Params4bit(codes, requires_grad=False, bnb_quantized=True, **fields)


def fill_linear4bit(layer: Any) -> None:
    """Sets what the constructor of ``Linear4bit`` would have set."""
    layer.compute_type_is_set = True
    layer.quant_state = None
    layer.quant_storage = torch.uint8
    layer.support_avx512bf16_for_cpu = False


def chosen_compute_dtype(layer: Any) -> torch.dtype | None:
    """Returns the dtype that the user chose for a ``Linear4bit``; ``None`` for the input's."""
    dtype: torch.dtype | None = layer.compute_dtype if layer.compute_type_is_set else None
    return dtype


def is_repacked_for_cpu(weight: Any) -> bool:
    """Whether an evaluation on a CPU repacked a weight, which passes no gradients then."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def paged_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns memory that the driver moves between ``device`` and the CPU as it is used."""
    memory: torch.Tensor = functional.get_paged(*shape, dtype=dtype, device=device)
    return memory


def save_linear8bit(layer: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
    """Writes the state of a ``Linear8bitLt``, as bitsandbytes does, into ``destination``."""
    bnb.nn.Linear8bitLt._save_to_state_dict(layer, destination, prefix, keep_vars)
