"""bitsandbytes' optimizers and paged memory."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor

from lightning_peft.compat.bitsandbytes import paged_memory

# transformers' names (``OptimizerNames``), and besides them the variants it has no name for.
OPTIMIZERS: dict[str, Any] = {
    "adamw_8bit": bnb.optim.AdamW8bit,
    "adamw_bnb_8bit": bnb.optim.AdamW8bit,
    "adamw_32bit": bnb.optim.AdamW32bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    "lion_8bit": bnb.optim.Lion8bit,
    "lion_32bit": bnb.optim.Lion32bit,
    "paged_lion_8bit": bnb.optim.PagedLion8bit,
    "paged_lion_32bit": bnb.optim.PagedLion32bit,
    # Not bitsandbytes' classes with 32bit in their name, whose states have a wrong shape (0.50.2).
    "ademamix": bnb.optim.AdEMAMix,
    "ademamix_32bit": bnb.optim.AdEMAMix,
    "ademamix_8bit": bnb.optim.AdEMAMix8bit,
    "paged_ademamix_8bit": bnb.optim.PagedAdEMAMix8bit,
    "paged_ademamix_32bit": bnb.optim.PagedAdEMAMix,
}


def paged_copy(value: Tensor, device: torch.device) -> Tensor:
    """A copy in memory that moves between ``device``, a GPU, and the CPU as it is used."""
    paged: Tensor = paged_memory(value.shape, value.dtype, device)
    return paged.copy_(value.cpu())
