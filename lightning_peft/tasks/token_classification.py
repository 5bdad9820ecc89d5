"""Token classification, such as named-entity recognition, and metrics of entity spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import AutoModelForTokenClassification

from lightning_peft.data.encoding import IGNORED
from lightning_peft.tasks.classification import ClassificationTask

Span = tuple[int, int, str]
# What a batch says of its words, which is not for the model.
_OF_WORDS = ("word_starts", "words")


def are_spans(labels: Sequence[str]) -> bool:
    """Whether these tags write spans as IOB2 does: ``O``, ``B-...`` and ``I-...``, no others."""
    return any(name.startswith("B-") for name in labels) and all(
        name == "O" or name.startswith(("B-", "I-")) for name in labels
    )


def spans_of(tags: Sequence[str]) -> set[Span]:
    """Returns the spans of a sentence: first word, word after the last, and kind.

    A span begins at ``B-X``, and at an ``I-X`` that does not go on with a span of the same kind:
    that is how the evaluation script of the CoNLL shared tasks, conlleval, reads answers that are
    no valid IOB2.
    """
    spans: set[Span] = set()
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            spans.add((begin, place, kind))
            kind = ""
        if prefix in ("B", "I") and not kind:
            begin, kind = place, name
    return spans


class SpanScores(Metric):
    """Precision, recall and F1 over spans, of all kinds together.

    A span is found if one with the same words and the same kind is among the answers (Tjong Kim
    Sang and De Meulder, 2003, "Introduction to the CoNLL-2003 Shared Task"). Precision is the
    share of answers that are right, recall the share of spans that are found, and F1 = 2 P R /
    (P + R). Each is 0 where nothing could be counted.
    """

    full_state_update = False
    higher_is_better = True
    found: Tensor
    answers: Tensor
    spans: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("found", "answers", "spans"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> None:
        """Adds sentences: the tags of their words, as the model gives them and as they are."""
        for tags, right in zip(predicted, expected, strict=True):
            answers, spans = spans_of(tags), spans_of(right)
            self.found += len(answers & spans)
            self.answers += len(answers)
            self.spans += len(spans)

    def compute(self) -> dict[str, Tensor]:
        """Returns ``precision``, ``recall`` and ``f1``."""
        both = self.answers + self.spans
        return {
            "precision": self.found / self.answers.clamp(min=1),
            "recall": self.found / self.spans.clamp(min=1),
            # 2 P R / (P + R), in whole numbers.
            "f1": 2 * self.found / both.clamp(min=1),
        }


class TokenClassifier(ClassificationTask):
    """A transformers model that gives each word a tag.

    Logs ``val_loss`` (cross-entropy in nats per token with a label) and ``val_accuracy`` (share of
    words whose most likely tag is the right one). Where the tags write spans (IOB2: ``O``,
    ``B-X``, ``I-X``) it logs ``val_f1``, ``val_precision`` and ``val_recall`` of whole spans (see
    :class:`SpanScores <lightning_peft.tasks.token_classification.SpanScores>`), and elsewhere
    ``val_macro_f1``, the mean over tags of 2 TP / (2 TP + FP + FN) in words. The same as
    ``test_...``. A word gets the tag of its first token. The head on top of the base is new, and
    is trained in full next to the adapters.

    The arguments are those of
    :class:`ClassificationTask <lightning_peft.tasks.classification.ClassificationTask>`
    and :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.
    """

    auto_class = AutoModelForTokenClassification
    architecture = "ForTokenClassification"

    def make_label_metrics(self) -> dict[str, Any]:
        """Returns accuracy in words, and F1 of spans or of tags."""
        count = len(self.labels)
        accuracy = {"accuracy": MulticlassAccuracy(count, average="micro")}
        if are_spans(self.labels):
            return {**accuracy, "spans": SpanScores()}
        return {**accuracy, "macro_f1": MulticlassF1Score(count, average="macro")}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the mean cross-entropy over the tokens of ``batch`` that have a label."""
        loss: Tensor = self(**_for_model(batch)).loss
        tokens = (batch["labels"] != IGNORED).sum()
        self.log_training(batch_idx, {"loss": loss}, tokens, len(batch["words"]))
        return loss

    def evaluate(self, batch: dict[str, Any]) -> None:
        """Adds the words of ``batch``."""
        output = self(**_for_model(batch))
        predicted, labels = output.logits.argmax(-1), batch["labels"]
        starts = batch["word_starts"].bool()
        self.metrics["loss"].update(output.loss, (labels != IGNORED).sum())
        self.metrics["accuracy"].update(predicted[starts], labels[starts])
        if are_spans(self.labels):
            predicted_tags, right = (self._tags(numbers, starts) for numbers in (predicted, labels))
            self.metrics["spans"].update(predicted_tags, right)
        else:
            self.metrics["macro_f1"].update(predicted[starts], labels[starts])

    def _tags(self, numbers: Tensor, starts: Tensor) -> list[list[str]]:
        names = self.labels
        rows = zip(numbers, starts, strict=True)
        return [[names[number] for number in row[first].tolist()] for row, first in rows]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Returns for each row its words that were not cut off, their tags, and any expected."""
        inputs = {name: value for name, value in _for_model(batch).items() if name != "labels"}
        starts = batch["word_starts"].bool()
        tags = self._tags(self(**inputs).logits.argmax(-1), starts)
        predictions = [
            {"words": list(words), "tags": word_tags}
            for words, word_tags in zip(batch["words"], tags, strict=True)
        ]
        if "labels" in batch:
            for row, right in zip(predictions, self._tags(batch["labels"], starts), strict=True):
                row["expected"] = right
        return predictions


def _for_model(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in _OF_WORDS}
