"""New output layers and fully trained layers, kept in full precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.plugin.injection_settings import KEPT_IN_FLOAT32
from lightning_peft.tasks.pretrained import PretrainedTask

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


class HeadedTask(PretrainedTask):
    """A model with an output layer for what the data asks, which is new or in the files."""

    def follow(self, data: Any) -> None:
        """Takes over what the data module specifies, or checks that it says the same."""

    def check_base(self, config: PretrainedConfig) -> None:
        """Refuses a base, by its own configuration, that contradicts data or arguments."""

    def configure_model(self) -> None:
        """Loads the model with its head in float32, once, after a look at the data."""
        if self._datamodule is not None:
            self.follow(self._datamodule)
        if self.model is None and self.hparams["config"] is None:
            self.check_base(self.base_config())
        super().configure_model()

    def _load(self) -> PreTrainedModel:
        model = super()._load()
        keep_heads_in_float32(model)
        return model


def keep_heads_in_float32(model: PreTrainedModel) -> None:
    """Puts what ``model`` has on top of its base in float32, and makes it take any precision.

    In 16-bit numbers, steps of less than half a per cent of a weight are rounded away.
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


if TYPE_CHECKING:
    from transformers import PretrainedConfig
