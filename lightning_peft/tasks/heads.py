"""New output layers, and others that train in full: their weights are kept in full precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.plugin.adapter_defaults import KEPT_IN_FLOAT32

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def keep_heads_in_float32(model: PreTrainedModel) -> None:
    """Puts what ``model`` has on top of its base in float32, and makes it take any precision.

    In 16 bits, steps of an optimizer of less than half a per cent of a weight are rounded away.
    """
    base = model.base_model
    keep_in_float32(child for child in model.children() if child is not base)


def keep_in_float32(modules: Iterable[nn.Module], reader: nn.Module | None = None) -> None:
    """Puts modules in float32, and makes them take any precision, and give that of ``reader``."""
    for module in modules:
        if any(param.is_floating_point() for param in module.parameters()):
            module.float()
            vars(module)[KEPT_IN_FLOAT32] = True
            module.register_forward_pre_hook(_in_their_dtype, with_kwargs=True)
            if reader is not None:
                module.register_forward_hook(_in_dtype_of(reader))


def _in_their_dtype(
    head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Without a strategy of this package, a precision plugin may have cast the module down.
    dtype = next(head.parameters()).dtype
    cast: tuple[Any, ...] = _cast(args, dtype)
    return cast, {name: _cast(value, dtype) for name, value in kwargs.items()}


def _in_dtype_of(reader: nn.Module) -> Any:
    # A function, which PEFT's copy of the module takes along as it is.
    def cast_output(_: nn.Module, __: Any, output: Any) -> Any:
        return _cast(output, next(reader.parameters()).dtype)

    return cast_output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_cast(one, dtype) for one in value)
    floating = isinstance(value, Tensor) and torch.is_floating_point(value)
    return value.to(dtype) if floating else value
