"""Sentence embeddings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_length
from torchmetrics import MeanMetric
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoModel

from lightning_peft.errors import ConfigError
from lightning_peft.sentence_folder import (
    Pooling,
    SentenceFolder,
    Similarity,
    read_sentence_folder,
)
from lightning_peft.tasks.embedding_losses import (
    cosent_loss,
    false_negatives,
    pair_similarities,
    ranking_loss,
)
from lightning_peft.tasks.pretrained import PretrainedTask
from lightning_peft.tasks.retrieval import RankCorrelation, Retrieval

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

_SCALES = {"cosine": 20.0, "dot": 1.0}


class SentenceEmbedder(PretrainedTask):
    """A transformers model that makes one vector of each text.

    Trained on batches of :class:`lightning_peft.EmbeddingData`. Anchors with positives get
    sentence-transformers' ``MultipleNegativesRankingLoss``: cross-entropy of the positive among all
    positives and negatives of the batch. Texts equal to the anchor, or to another positive of an
    equal anchor, are left out. Pairs with scores get ``CoSENTLoss`` or
    ``CosineSimilarityLoss``.

    Negatives are those of the batch of one process: accumulated batches and other processes add
    rows to a step, and no negatives to a row. Rows count alike in a step; CoSENT's loss is one
    number for a batch, of which a step takes the mean.

    Logs ``val_loss`` and, for anchors, ``val_accuracy`` and ``val_mrr`` (whether, and at which
    rank, an anchor finds its positive among all documents of the split), and ``val_masked`` (texts
    left out per anchor, mean); for scores, ``val_spearman`` (rank correlation of similarity and
    score). The same as ``test_...``; the loss also as ``train_...``.

    Args:
        model: Name on the hub, or folder, of a transformers or sentence-transformers model.
        pooling: How the vectors of the tokens become one: ``"mean"``, ``"cls"`` (the first) or
            ``"lasttoken"``; by default what the model's files say, and else ``"lasttoken"`` for a
            decoder and ``"mean"`` for any other model.
        normalize: Whether embeddings have length 1; by default what the files say, and else no.
        similarity: ``"cosine"`` or ``"dot"``; by default what the files say, and else cosine.
        scale: What similarities are multiplied by in the loss, 1 / temperature; by default 20 for
            cosine and 1 for dot.
        symmetric: Also look for the anchor of each positive, and take the mean of both losses.
        scored_loss: Of pairs with scores: ``"cosent"``, which learns their order, or ``"cosine"``,
            the squared difference of similarity and score.
        **options: Keyword arguments of
            :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other, the model's files, or the data.
    """

    auto_class = AutoModel
    couples_rows = True
    # Submodules that compute nothing the embeddings are made of; they get no adapters.
    unused_modules: tuple[str, ...] = ()
    positive = (*PretrainedTask.positive, "scale")

    def __init__(
        self,
        model: str,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        similarity: Similarity | None = None,
        scale: float | None = None,
        symmetric: bool = False,
        scored_loss: Literal["cosent", "cosine"] = "cosent",
        **options: Any,
    ) -> None:
        super().__init__(model, **options)

    def make_metrics(self) -> dict[str, Any]:
        """Returns those of anchors and of pairs with scores; the data decides which have values."""
        return {
            "loss": MeanMetric(),
            "masked": MeanMetric(),
            "retrieval": Retrieval(),
            "spearman": RankCorrelation(),
        }

    def results(self) -> dict[str, Any]:
        """Returns the values of the metrics that got any rows."""
        found: dict[str, Any] = {}
        for name, metric in self.metrics.items():
            if metric.update_called:
                value = metric.compute()
                found |= value if isinstance(value, dict) else {name: value}
        return found

    def configure_model(self) -> None:
        """Loads the model, and decides how embeddings are made; once."""
        self._check_scores(self._datamodule)
        if self.model is None:
            config = self.model_config()
            if config.is_encoder_decoder:
                raise ConfigError(
                    f"{self.hparams['model']!r} has an encoder and a decoder, and embeddings are "
                    "made by one of them. Take an encoder or a decoder."
                )
            self._settle(config)
        super().configure_model()

    def prepare_model(self, model: Any) -> None:
        """Freezes the summary of the first token of BERT and its like: pooling does not use it."""
        pooler = getattr(model, "pooler", None)
        if isinstance(pooler, torch.nn.Module):
            pooler.requires_grad_(False)
            self.unused_modules = ("model.pooler",)

    def _settle(self, config: PretrainedConfig) -> None:
        """Fills in pooling, normalizing, similarity and scale."""
        hparams = self.hparams
        folder = SentenceFolder()
        if hparams["config"] is None:
            folder = read_sentence_folder(hparams["model"], hparams["revision"])
        similarity = hparams["similarity"] or folder.similarity or "cosine"
        found = {
            "pooling": folder.pooling or _usual_pooling(config),
            "normalize": folder.normalize,
            "similarity": similarity,
            "scale": _SCALES[similarity],
        }
        chosen = [name for name in found if hparams[name] is None]
        hparams.update({name: found[name] for name in chosen})
        self.metrics["retrieval"].similarity = hparams["similarity"]
        if {"pooling", "normalize"} & {*chosen} and not folder.known:
            log.warning(
                "%r has no modules.json, which says how embeddings are made: pooling=%r and "
                "normalize=%s are taken. Name them if they are to be others.",
                hparams["model"],
                hparams["pooling"],
                hparams["normalize"],
            )

    def _check_scores(self, data: Any) -> None:
        found = getattr(data, "score_range", None)
        if found is None or self.hparams["scored_loss"] != "cosine":
            return
        low, high = found
        if low < -1 or high > 1:
            raise ConfigError(
                "scored_loss='cosine' makes similarities, from -1 to 1, equal to scores, and those "
                f"of the data are from {low:g} to {high:g}. Divide them, or take "
                "scored_loss='cosent', which learns their order alone."
            )

    @property
    def output_settings(self) -> dict[str, Any]:
        """How embeddings are made, for the record of a run."""
        return {name: self.hparams[name] for name in ("pooling", "normalize", "similarity")}

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the embeddings of ``(texts, length)`` tokens, ``(texts, dimension)``, float32."""
        hidden = self(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = pool(hidden.float(), attention_mask, self.hparams["pooling"])
        return unit_length(pooled, dim=-1) if self.hparams["normalize"] else pooled

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the loss of each row of ``batch``, ``(rows,)``; of CoSENT a scalar."""
        return self._measure(batch)["loss"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of ``batch``."""
        measured, rows = self._measure(batch), _rows_of(batch)
        names = ("loss", "masked")
        means: dict[str, Tensor] = {n: measured[n].mean() for n in names if n in measured}
        items = means["loss"].new_tensor(measured["loss"].numel())
        self.log_training(batch_idx, means, items, rows)
        return means["loss"]

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Adds the rows of ``batch``."""
        measured, rows = self._measure(batch), _rows_of(batch)
        for name in ("loss", "masked"):
            if name in measured:
                self.metrics[name].update(measured[name])
        if "scores" in batch:
            self.metrics["spearman"].update(measured["similarity"], batch["scores"])
            return
        found, digests = measured["embeddings"], batch["digests"]
        self.metrics["retrieval"].update(found[:rows], found[rows:], digests[:rows], digests[rows:])

    def _measure(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the losses, of each row or of the batch, and what else is measured."""
        hparams, rows = self.hparams, _rows_of(batch)
        found = self.embed(batch["input_ids"], batch["attention_mask"])
        # Products of 16 bits would blur which text is nearest.
        with torch.autocast(found.device.type, enabled=False):
            first, others = found[:rows], found[rows:]
            if "scores" in batch:
                similar = pair_similarities(first, others, hparams["similarity"])
                return {
                    "embeddings": found,
                    "similarity": similar,
                    "loss": self._scored_loss(similar, batch["scores"]),
                }
            digests = batch["digests"]
            left_out = false_negatives(digests[:rows], digests[rows:])
            loss = ranking_loss(
                first, others, left_out, *(hparams[n] for n in ("scale", "similarity", "symmetric"))
            )
            similar = pair_similarities(first, others[:rows], hparams["similarity"])
        masked = left_out.sum(dim=1).float()
        return {"embeddings": found, "similarity": similar, "loss": loss, "masked": masked}

    def _scored_loss(self, similar: Tensor, scores: Tensor) -> Tensor:
        if self.hparams["scored_loss"] == "cosine":
            return (similar - scores).square()
        return cosent_loss(similar, scores, self.hparams["scale"])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Returns for each row the ``embeddings`` of its texts and the ``similarity`` of two.

        These are the anchor's, the positive's and those of its negatives, or those of both texts;
        and the ``score``, where the row has one.
        """
        measured, rows = self._measure(batch), _rows_of(batch)
        found: list[dict[str, Any]] = [
            {"similarity": value, "embeddings": []} for value in measured["similarity"].tolist()
        ]
        for row, embedding in zip(
            batch["rows"].tolist(), measured["embeddings"].tolist(), strict=True
        ):
            found[row]["embeddings"].append(embedding)
        if "scores" in batch:
            for number in range(rows):
                found[number]["score"] = batch["scores"][number].item()
        return found


def _rows_of(batch: dict[str, Tensor]) -> int:
    return int(batch["rows"].max()) + 1


def _usual_pooling(config: PretrainedConfig) -> Pooling:
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    # BERT's configuration also makes a model that generates.
    return "lasttoken" if decoder and type(config) not in MODEL_FOR_MASKED_LM_MAPPING else "mean"


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Returns one vector per text, ``(texts, width)``, of those of its tokens that ``mask`` has."""
    if pooling == "mean":
        weights = mask[:, :, None].to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    positions = torch.arange(mask.shape[1], device=mask.device)
    if pooling == "cls":
        place = mask.to(torch.int).argmax(dim=1)
    else:
        place = (positions * mask).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), place]
