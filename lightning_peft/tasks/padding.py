"""Padding tokens of models that read the last non-padding token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
if TYPE_CHECKING:
    from transformers import PretrainedConfig
from lightning_peft.tasks.heads import HeadedTask


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
