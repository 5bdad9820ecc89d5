"""Tasks with a chosen and a rejected answer per prompt."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric

from lightning_peft.tasks.pretrained import PretrainedTask


class PairwiseTask(PretrainedTask):
    """A model that is trained on batches of :class:`lightning_peft.PreferenceData`."""

    @abstractmethod
    def compared(self) -> tuple[str, ...]:
        """Returns the names of what :meth:`compare` returns."""

    @abstractmethod
    def compare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns ``loss`` and what else is measured, by name, each ``(pairs,)``, float32."""

    def make_metrics(self) -> dict[str, Any]:
        """Returns means over pairs."""
        return {name: MeanMetric() for name in self.compared()}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean loss over the pairs of ``batch``."""
        measured = self.compare(batch)
        pairs = len(measured["loss"])
        means = {name: values.mean() for name, values in measured.items()}
        self.log_training(batch_idx, means, means["loss"].new_tensor(pairs), pairs)
        return means["loss"]

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Adds the pairs of ``batch``."""
        for name, values in self.compare(batch).items():
            self.metrics[name].update(values)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, float]]:
        """Returns the measurements of each pair, by name."""
        measured = {name: values.tolist() for name, values in self.compare(batch).items()}
        return [
            dict(zip(measured, values, strict=True))
            for values in zip(*measured.values(), strict=True)
        ]
