"""Image classification."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import AutoModelForImageClassification

from lightning_peft.tasks.classification import ClassificationTask

log = logging.getLogger(__name__)


class ImageClassifier(ClassificationTask):
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

    def make_label_metrics(self) -> dict[str, Any]:
        """Returns accuracy and macro F1."""
        count = len(self.labels)
        return {
            "accuracy": MulticlassAccuracy(count, average="micro"),
            "f1": MulticlassF1Score(count, average="macro"),
        }

    def configuration(self) -> dict[str, Any]:
        """Returns the labels, and the loss: transformers would guess it from the dtype."""
        return {**super().configuration(), "problem_type": "single_label_classification"}

    def check_head(self, base_labels: list[str]) -> None:
        """Refuses a head for the same labels in another order.

        A head for as many other labels is kept as the start of training, which is logged; one of
        another size is replaced.
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

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean cross-entropy over the images of ``batch``."""
        logits = self(pixel_values=batch["pixel_values"]).logits
        loss = cross_entropy(logits.float(), batch["labels"])
        rows = len(batch["labels"])
        self.log_training(batch_idx, {"loss": loss}, loss.new_tensor(rows), rows)
        return loss

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Adds the images of ``batch``."""
        logits, labels = self(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"]
        self.metrics["loss"].update(cross_entropy(logits, labels, reduction="none"))
        for name in ("accuracy", "f1"):
            self.metrics[name].update(logits, labels)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Returns, for each image, the most likely ``label`` and all ``probabilities`` by label."""
        logits = self(pixel_values=batch["pixel_values"]).logits
        labels = self.hparams["labels"]
        rows = torch.softmax(logits.float(), dim=-1).tolist()
        return [
            {
                "label": labels[max(range(len(row)), key=row.__getitem__)],
                "probabilities": dict(zip(labels, row, strict=True)),
            }
            for row in rows
        ]
