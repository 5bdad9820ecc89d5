"""Shared parts of classifiers: label names that agree in model, data and files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.tasks.heads import HeadedTask

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ClassificationTask(HeadedTask):
    """A transformers model with a head that distinguishes labels.

    The names of the labels come from the data when the model is loaded, unless they are given.
    They are kept in the model's configuration and in the hyperparameters, so that a checkpoint
    can be loaded without the data. Data, or a checkpoint, with other names or another order of
    them is refused: every answer would be given the wrong name.

    Args:
        model: As of :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.
        labels: The names of the labels in the order of their numbers; by default those of the
            data module.
        **options: Keyword arguments of
            :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data.
    """

    # What transformers calls models with such a head, after the name of the base.
    architecture: ClassVar[str]

    def __init__(self, model: str, labels: list[str] | None = None, **options: Any) -> None:
        super().__init__(model, **options)

    @property
    def labels(self) -> list[str]:
        """The names of the labels, in the order of their numbers."""
        if self.hparams["labels"] is None:
            raise ConfigError(
                f"{type(self).__name__} does not know its labels. Train it on a data module of "
                "this package, which does, or give their names in order with labels=."
            )
        return list(self.hparams["labels"])

    def make_metrics(self) -> dict[str, Any]:
        """Returns the mean loss; the others follow when the labels are known."""
        return {"loss": MeanMetric()}

    def make_label_metrics(self) -> dict[str, Any]:
        """Returns the metrics that depend on the labels."""
        return {}

    def configuration(self) -> dict[str, Any]:
        """Returns the names of the labels, by number and by name."""
        labels = self.labels
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {name: number for number, name in enumerate(labels)},
        }

    def prepare_model(self, model: Any) -> None:
        """Adds the metrics, for which the labels are known now."""
        super().prepare_model(model)
        self.metrics.add_metrics(self.make_label_metrics())

    def follow(self, data: Any) -> None:
        """Takes over the labels of the data module, or checks that they are the same."""
        labels = getattr(data, "labels", None)
        if labels is None:
            return
        if self.hparams["labels"] is None:
            self.hparams["labels"] = list(labels)
        elif self.labels != list(labels):
            raise ConfigError(
                "The labels of the data are not those of the model. "
                f"{_difference(self.labels, list(labels))} Give the data module "
                f"labels={self.labels}, so that it numbers them in this order, or make the "
                "model for the labels of the data."
            )

    def check_base(self, config: PretrainedConfig) -> None:
        """Refuses a base whose own head would be taken over for labels of other names."""
        if not any(name.endswith(self.architecture) for name in config.architectures or []):
            return
        names: dict[Any, str] = dict(config.id2label or {})
        theirs = [names[number] for number in sorted(names)]
        unnamed = all(name.startswith("LABEL_") for name in theirs)
        if theirs == self.labels or (unnamed and len(theirs) == len(self.labels)):
            return
        self.check_head(theirs)

    def check_head(self, base_labels: list[str]) -> None:
        """Refuses a head for other labels, unless a task can begin from it and overrides this."""
        same = sorted(base_labels) == sorted(self.labels)
        remedy = (
            f"Give labels={base_labels} to the data module, so that it numbers them in this order."
            if same
            else "Begin with the model that it was tuned from, whose head is new."
        )
        raise ConfigError(
            f"{self.hparams['model']!r} has a head that was trained for other labels, which would "
            f"be taken over. {_difference(base_labels, self.labels)} {remedy}"
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint whose labels have other names or another order."""
        theirs = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("labels")
        if theirs is not None and list(theirs) != self.labels:
            numbers = all(str(name).isdecimal() for name in theirs)
            reason = " Numbers that the data names are read as names now." if numbers else ""
            raise CheckpointError(
                "The checkpoint was trained for other labels, so that its answers would get wrong "
                f"names. {_difference(theirs, self.labels)}{reason} Give the data module, or the "
                f"model, labels={list(theirs)}."
            )


class RowClassifier(ClassificationTask):
    """A classifier that gives each row one label: a text, or an image."""

    def make_label_metrics(self) -> dict[str, Any]:
        """Returns accuracy and macro F1."""
        count = len(self.labels)
        return {
            "accuracy": MulticlassAccuracy(count, average="micro"),
            "f1": MulticlassF1Score(count, average="macro"),
        }

    def configuration(self) -> dict[str, Any]:
        """Returns the labels, and the loss: a base may come with another one."""
        return {**super().configuration(), "problem_type": "single_label_classification"}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean cross-entropy over the rows of ``batch``."""
        loss = cross_entropy(self._logits(batch), batch["labels"])
        rows = len(batch["labels"])
        self.log_training(batch_idx, {"loss": loss}, loss.new_tensor(rows), rows)
        return loss

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Adds the rows of ``batch``."""
        logits, labels = self._logits(batch), batch["labels"]
        self.metrics["loss"].update(cross_entropy(logits, labels, reduction="none"))
        for name in ("accuracy", "f1"):
            self.metrics[name].update(logits, labels)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Returns for each row the most likely ``label``, and all ``probabilities`` by label.

        A row of ``batch`` that has a label gets it as ``expected``.
        """
        names = self.labels
        rows = [
            {
                "label": names[max(range(len(row)), key=row.__getitem__)],
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for row in self._logits(batch).softmax(-1).tolist()
        ]
        if "labels" in batch:
            for row, label in zip(rows, batch["labels"].tolist(), strict=True):
                row["expected"] = names[label]
        return rows

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = self(**inputs).logits.float()
        return logits


def _difference(other: list[str], ours: list[str]) -> str:
    """Returns in what two lists of names differ, as sentences."""
    if sorted(other) == sorted(ours):
        place = next(
            i for i, pair in enumerate(zip(other, ours, strict=True)) if pair[0] != pair[1]
        )
        return (
            f"They are in another order: number {place} is {other[place]!r}, not {ours[place]!r}."
        )
    lacking = [name for name in other if name not in ours]
    new = [name for name in ours if name not in other]
    parts = [f"only there: {lacking}"] * bool(lacking) + [f"only here: {new}"] * bool(new)
    return f"There are {len(other)} there and {len(ours)} here; {'; '.join(parts)}."
