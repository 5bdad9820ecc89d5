"""New output layers and fully trained layers, kept in full precision, and padding tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.errors import ConfigError
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


class PaddingOfData(HeadedTask):
    """Takes ``pad_token_id`` over from the data, and sets it in the model's configuration."""

    # Whether it is the data that says what padding is.
    _padding_of_data = False

    def follow(self, data: Any) -> None:
        """Takes over the padding of the data too, or checks that it is the same."""
        super().follow(data)
        filler = getattr(data, "pad_token_id", None)
        if filler is None or filler == self.hparams["pad_token_id"]:
            return
        if self.hparams["pad_token_id"] is not None:
            raise ConfigError(
                f"The data fills up short rows with token {filler}, and the model has "
                f"pad_token_id={self.hparams['pad_token_id']}: it would read its answer at "
                "padding. Use the tokenizer that it was trained with, or leave pad_token_id out."
            )
        self.hparams["pad_token_id"] = filler
        self._padding_of_data = True

    def check_base(self, config: PretrainedConfig) -> None:
        """Refuses also a base that takes another token for padding than the data."""
        super().check_base(config)
        theirs, ours = config.get_text_config().pad_token_id, self.hparams["pad_token_id"]
        if self._padding_of_data and theirs not in (None, ours):
            raise ConfigError(
                f"The tokenizer fills up short rows with token {ours}, and "
                f"{self.hparams['model']!r} takes token {theirs} for padding: a decoder would read "
                "its answer at padding. Use the tokenizer of the model, or, if the tokenizer is "
                f"right, say so with pad_token_id={ours}."
            )

    def configuration(self) -> dict[str, Any]:
        """Returns the other fields, and of a model without weights its padding."""
        built, padding = self.hparams["config"], self.hparams["pad_token_id"]
        own = super().configuration()
        if built is None or padding is None or "pad_token_id" in built:
            return own
        return {**own, "pad_token_id": padding}

    def prepare_model(self, model: Any) -> None:
        """Sets the padding in the configuration of the model, if it is known."""
        super().prepare_model(model)
        if self.hparams["pad_token_id"] is not None:
            # Models of several parts read it from the part for text.
            for config in (model.config, model.config.get_text_config()):
                config.pad_token_id = self.hparams["pad_token_id"]
