"""Rerankers (cross-encoders)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAveragePrecision
from transformers import AutoModelForSequenceClassification

from lightning_peft.errors import ConfigError
from lightning_peft.tasks.padding import PaddingOfData
from lightning_peft.tasks.retrieval import RankCorrelation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

_IDENTITY = "torch.nn.modules.linear.Identity"
_SIGMOID = "torch.nn.modules.activation.Sigmoid"


class Reranker(PaddingOfData):
    """A transformers model with one output: how well a passage answers a query (cross-encoder).

    Trained on batches of :class:`lightning_peft.RerankingData`. Passages with scores get
    sentence-transformers' ``BinaryCrossEntropyLoss``. A positive with negatives gets the
    cross-entropy of the positive among the passages of its row, as its
    ``MultipleNegativesRankingLoss`` for cross-encoders computes it without negatives of other rows.

    Logs ``val_loss``, ``val_accuracy`` and ``val_average_precision``. With scores, accuracy is the
    share of pairs that are on the right side of one half, and ``val_spearman`` is the rank
    correlation with the scores; with negatives, it is the share of rows whose positive is first,
    and ``val_mrr`` the mean of 1 / its rank. Average precision is over all pairs, those with a
    score of at least one half counting as right. The same as ``test_...``; the loss also as
    ``train_...``. The output layer is new where the base has none, and trains in full.

    Args:
        model: Name on the hub, or folder, of a transformers model.
        loss: ``"binary"`` or ``"ranking"``; by default ``"ranking"`` for rows with negatives.
        scale: With ``"ranking"``: what the scores from 0 to 1 are multiplied by before the softmax.
        pad_token_id: The token that fills up short rows; by default that of the data module.
        **options: Keyword arguments of
            :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data.
    """

    auto_class = AutoModelForSequenceClassification
    positive = (*PaddingOfData.positive, "scale")

    def __init__(
        self,
        model: str,
        loss: Literal["binary", "ranking"] | None = None,
        scale: float = 10.0,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)

    def make_metrics(self) -> dict[str, Any]:
        """Returns those of scores and of rankings; the data decides which have values."""
        return {
            "loss": MeanMetric(),
            "accuracy": MeanMetric(),
            "average_precision": BinaryAveragePrecision(),
            "mrr": MeanMetric(),
            "spearman": RankCorrelation(),
        }

    def results(self) -> dict[str, Any]:
        """Returns the values of the metrics that got any rows."""
        return {n: metric.compute() for n, metric in self.metrics.items() if metric.update_called}

    def configuration(self) -> dict[str, Any]:
        """Returns one output, and the padding of a model without weights."""
        return {"num_labels": 1, **super().configuration()}

    def follow(self, data: Any) -> None:
        """Takes over the padding; refuses a loss that the rows are not for."""
        super().follow(data)
        if self.hparams["loss"] == "ranking" and getattr(data, "scored", False):
            raise ConfigError(
                "loss='ranking' looks for the positive among the passages of a row, and the rows "
                "of the data have one passage each, with a score. Leave loss out, or give rows "
                "with query, positive and negatives."
            )
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is None:
            return
        added = [tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)]
        if added[0] == added[1]:
            log.warning(
                "The tokenizer of %r puts nothing between query and passage, so that nothing shows "
                "where the passage begins. Begin each passage with a mark of your own, here and "
                "where the model is used.",
                self.hparams["model"],
            )

    def check_base(self, config: PretrainedConfig) -> None:
        """Refuses a base with other padding, or with a head of several outputs."""
        super().check_base(config)
        headed = any(
            name.endswith("ForSequenceClassification") for name in config.architectures or []
        )
        if headed and config.num_labels != 1:
            raise ConfigError(
                f"{self.hparams['model']!r} has a head for {config.num_labels} labels, and a "
                "reranker has one output. Begin with the model that it was tuned from, whose head "
                "is new."
            )

    @property
    def activation(self) -> str:
        """Class of torch that makes scores of the model's outputs, by its configuration."""
        assert self.model is not None
        given = getattr(self.model.config, "sentence_transformers", None) or {}
        old = getattr(self.model.config, "sbert_ce_default_activation_function", None)
        name = str(given.get("activation_fn") or old or _SIGMOID)
        if name not in (_IDENTITY, _SIGMOID):
            raise ConfigError(
                f"{self.hparams['model']!r} makes scores by {name}, and Sigmoid or Identity are "
                "computed here. Take another model."
            )
        return name

    @property
    def output_settings(self) -> dict[str, Any]:
        """How scores are made, for the record of a run."""
        return {"activation": self.activation, "pad_token_id": self.hparams["pad_token_id"]}

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the output of each pair of ``batch``, ``(pairs,)``, float32."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        found: Tensor = self(**inputs).logits
        return found[:, 0].float()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean loss over the pairs, or rows, of ``batch``."""
        losses = self._losses(self.logits(batch), batch)
        loss = losses.mean()
        rows = int(batch["rows"].max()) + 1
        self.log_training(batch_idx, {"loss": loss}, loss.new_tensor(len(losses)), rows)
        return loss

    def _losses(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        binary = not _ranked(batch) or self.hparams["loss"] == "binary"
        if binary:
            return binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none")
        scores = in_rows(self.hparams["scale"] * logits.sigmoid(), batch["rows"])
        return torch.logsumexp(scores, dim=1) - scores[:, 0]

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Adds the pairs of ``batch``."""
        logits, labels = self.logits(batch), batch["labels"]
        self.metrics["loss"].update(self._losses(logits, batch))
        right = labels >= 0.5
        # The metric takes a batch whose outputs are all from 0 to 1 for probabilities.
        chances = logits.sigmoid()
        chances = torch.where(chances.isnan(), (~right).float(), chances)
        self.metrics["average_precision"].update(chances, right.long())
        if not _ranked(batch):
            self.metrics["accuracy"].update((((logits >= 0) == right) & ~logits.isnan()).float())
            self.metrics["spearman"].update(logits, labels)
            return
        scores = in_rows(logits, batch["rows"])
        # A score that is not a number has found nothing.
        ranks = (~(scores[:, 1:] < scores[:, :1])).sum(dim=1) + 1
        self.metrics["accuracy"].update((ranks == 1).float())
        self.metrics["mrr"].update(1 / ranks.float())

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Returns the ``scores`` of the passages of each row, and what they are by the data.

        Scores are as sentence-transformers' ``CrossEncoder.predict`` gives them.
        """
        found = self.logits(batch)
        scores = found if self.activation == _IDENTITY else found.sigmoid()
        rows: list[dict[str, Any]] = [
            {"scores": [], "expected": []} for _ in range(int(batch["rows"].max()) + 1)
        ]
        values = (batch["rows"].tolist(), scores.tolist(), batch["labels"].tolist())
        for row, score, label in zip(*values, strict=True):
            rows[row]["scores"].append(score)
            rows[row]["expected"].append(label)
        return rows


def _ranked(batch: dict[str, Tensor]) -> bool:
    """Returns whether rows have several passages."""
    return len(batch["rows"]) > int(batch["rows"].max()) + 1


def in_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Returns values of pairs, by row, ``(rows, most pairs of a row)``, filled up with -inf."""
    counts = torch.bincount(rows)
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(rows), device=rows.device) - starts[rows]
    found = values.new_full((len(counts), int(counts.max())), -torch.inf)
    return found.index_put((rows, places), values)
