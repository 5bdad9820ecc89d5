"""Classification of texts and text pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoModelForSequenceClassification

from lightning_peft.tasks.padding import PaddingOfData

if TYPE_CHECKING:
    pass
from lightning_peft.tasks.classification import RowClassifier


class TextClassifier(PaddingOfData, RowClassifier):
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
        super().__init__(model, labels, **options)
