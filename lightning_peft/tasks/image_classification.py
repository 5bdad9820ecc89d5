"""Image classification."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from transformers import AutoModelForImageClassification

if TYPE_CHECKING:
    pass
from lightning_peft.tasks.classification import RowClassifier

log = logging.getLogger(__name__)


class ImageClassifier(RowClassifier):
    """An image model with a head for the classes of the data.

    Logs ``val_loss`` (nats per image), ``val_accuracy`` (share of images whose class is the most
    likely one) and ``val_f1`` (the mean over classes of F1), and the same as ``test_...``. A base
    that comes with a head for another number of classes, as those trained on ImageNet do, gets a
    fresh one, which is trained in full.

    The arguments are those of
    :class:`ClassificationTask <lightning_peft.tasks.classification.ClassificationTask>`.

    Raises:
        ConfigError: If arguments contradict each other or the data's labels.
    """

    auto_class = AutoModelForImageClassification
    architecture = "ForImageClassification"
    # A pretrained head is for the classes of its own data.
    loading = {"ignore_mismatched_sizes": True}

    def check_head(self, base_labels: list[str]) -> None:
        """Refuses a head for the same labels in another order.

        One for as many other labels is the start of training; one of another size is replaced.
        """
        if sorted(base_labels) == sorted(self.labels):
            super().check_head(base_labels)
        if len(base_labels) == len(self.labels):
            log.warning(
                "The head of %r is for other labels (%s). It has as many outputs as there are "
                "labels here, so its weights are kept as the start of training; until then its "
                "answers mean nothing.",
                self.hparams["model"],
                ", ".join(base_labels[:20]),
            )
