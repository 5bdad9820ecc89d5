"""New output layers: they train in full, so their weights are kept in full precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def keep_heads_in_float32(model: PreTrainedModel) -> None:
    """Puts what ``model`` has on top of its base model in float32, and makes it take any precision.

    A 16-bit checkpoint is loaded with a 16-bit head, and steps of an optimizer that are
    less than half a per cent of a weight would be rounded away.
    """
    base = model.base_model
    for child in model.children():
        if child is not base and any(param.is_floating_point() for param in child.parameters()):
            child.float()
            child.register_forward_pre_hook(_in_their_dtype)


def _in_their_dtype(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # After a precision plugin cast the module, it is no longer float32.
    dtype = next(head.parameters()).dtype
    return tuple(
        arg.to(dtype) if isinstance(arg, Tensor) and torch.is_floating_point(arg) else arg
        for arg in args
    )
