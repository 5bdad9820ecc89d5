"""Classification of texts, or of pairs of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSequenceClassification

from lightning_peft.errors import ConfigError
from lightning_peft.tasks.classification import RowClassifier

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class TextClassifier(RowClassifier):
    """A transformers model that gives each text one of some labels.

    Logs ``val_loss`` (cross-entropy in nats per row), ``val_accuracy`` (share of rows whose most
    likely label is the right one) and ``val_f1`` (macro: the mean over labels of 2 TP / (2 TP + FP
    + FN), without labels that are neither in the rows nor among the answers), and the same as
    ``test_...``. The head on top of the base is new, and is trained in full next to the adapters.

    A decoder reads its answer at the last token that is not padding, so its configuration has to
    know the padding. It is taken from the data; a base that says otherwise is refused.

    Args:
        model: As of :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.
        labels: The names of the labels in the order of their numbers; by default those of the
            data module.
        pad_token_id: The token that fills up short rows; by default that of the data module.
        **options: Keyword arguments of
            :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data.
    """

    auto_class = AutoModelForSequenceClassification
    architecture = "ForSequenceClassification"

    def __init__(
        self,
        model: str,
        labels: list[str] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> None:
        # Whether it is the data that says what padding is.
        self._padding_of_data = False
        super().__init__(model, labels, **options)

    def follow(self, data: Any) -> None:
        """Takes over labels and padding of the data module, or checks that they are the same.

        Args:
            data: A data module; only one with ``labels`` or ``pad_token_id`` says anything.

        Raises:
            ConfigError: If it says something else than the arguments.
        """
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
        """Refuses a base that takes another token for padding, or has other labels.

        Args:
            config: The configuration of the base, as it is.

        Raises:
            ConfigError: If it does.
        """
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
        """Returns labels and loss; of a model without weights, also its padding."""
        fields = super().configuration()
        built, padding = self.hparams["config"], self.hparams["pad_token_id"]
        if built is None or padding is None or "pad_token_id" in built:
            return fields
        return {**fields, "pad_token_id": padding}

    def configure_model(self) -> None:
        """Loads the model, and tells it which token is padding.

        Raises:
            ConfigError: If data, arguments and base contradict each other.
        """
        known = self.model is not None
        super().configure_model()
        if known or self.hparams["pad_token_id"] is None:
            return
        assert self.model is not None
        # Models of several parts read it from the part for text.
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = self.hparams["pad_token_id"]
