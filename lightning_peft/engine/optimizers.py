"""What optimizers of bitsandbytes need beyond what Lightning does."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional as bnb

# bitsandbytes pages only states of at least this many elements.
_PAGED_FROM = 100_000


def restore_paging(optimizer: Any) -> int:
    """Moves restored states of a paged optimizer back into paged memory.

    Loading a state dict puts plain tensors where the paged buffers were, and from then on the
    optimizer would hold all its states on the GPU, without a word.

    Args:
        optimizer: Any optimizer; only paged ones of bitsandbytes on CUDA are changed.

    Returns:
        The number of states moved.
    """
    moved = 0
    if not getattr(optimizer, "is_paged", False):
        return moved
    for param, state in optimizer.state.items():
        for name, value in state.items():
            pageable = (
                isinstance(value, torch.Tensor)
                and param.device.type == "cuda"
                and value.shape == param.shape
                and value.numel() >= _PAGED_FROM
                and not getattr(value, "is_paged", False)
            )
            if pageable:
                paged = bnb.get_paged(*value.shape, dtype=value.dtype, device=param.device)
                paged.copy_(value.cpu())
                state[name] = paged
                moved += 1
    return moved
