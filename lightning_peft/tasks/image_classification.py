"""Image classification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import AutoConfig, AutoModelForImageClassification

from lightning_peft.tasks.labels import (
    agreed_labels,
    check_labels_of,
    check_labels_of_model,
    label_configuration,
)
from lightning_peft.tasks.pretrained import PretrainedTask


class ImageClassifier(PretrainedTask):
    """An image model with a head for the classes of the data.

    Logs ``val_loss`` (nats per image), ``val_accuracy`` (share of images whose class is the most
    likely one) and ``val_f1`` (the mean over classes of F1), and the same as ``test_...``. A head
    that does not fit the classes is replaced by a fresh one, which is trained in full.

    Args:
        model: Name on the hub, or folder, of a transformers model.
        labels: Names of the classes in the order of the outputs; by default those of the data.
            They are kept in checkpoints.
        **options: Keyword arguments of :class:`PretrainedTask
            <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other or the data's labels.
    """

    auto_class = AutoModelForImageClassification
    # A pretrained head is for the classes of its own data.
    loading = {"ignore_mismatched_sizes": True}

    def __init__(self, model: str, labels: list[str] | None = None, **options: Any) -> None:
        super().__init__(model, **options)

    def make_metrics(self) -> dict[str, Any]:
        """Returns means over images; over classes once they are known."""
        labels = self.hparams["labels"]
        metrics: dict[str, Any] = {"loss": MeanMetric()}
        if labels is not None:
            metrics["accuracy"] = MulticlassAccuracy(len(labels), average="micro")
            metrics["f1"] = MulticlassF1Score(len(labels), average="macro")
        return metrics

    def setup(self, stage: str) -> None:
        """Takes the labels from the data.

        Raises:
            ConfigError: If they are not known, or not those that the task was given.
        """
        data = getattr(self.trainer, "datamodule", None)
        given = getattr(data, "labels", None)
        names = type(self).__name__, type(data).__name__ if data is not None else "the data"
        self.hparams["labels"] = agreed_labels(self.hparams["labels"], given, *names)
        self.metrics = MetricCollection(self.make_metrics(), compute_groups=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other labels.

        Raises:
            CheckpointError: If they differ, be it in order alone.
        """
        if self.hparams["labels"] is not None:
            check_labels_of(checkpoint, self.hparams["labels"])

    def configuration(self) -> dict[str, Any]:
        """Returns the names of the classes."""
        labels = self.hparams["labels"]
        return {} if labels is None else label_configuration(labels)

    def configure_model(self) -> None:
        """Loads the model; once.

        Raises:
            ConfigError: If its head is for the same labels in another order.
        """
        given = self.hparams
        if self.model is None and given["config"] is None and given["labels"] is not None:
            options = {name: given[name] for name in ("revision", "trust_remote_code")}
            pretrained = AutoConfig.from_pretrained(given["model"], **options)
            check_labels_of_model(pretrained.id2label, given["labels"], given["model"])
        super().configure_model()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean cross-entropy over the images of ``batch``."""
        logits = self(pixel_values=batch["pixel_values"]).logits
        loss = cross_entropy(logits.float(), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
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
