"""Entity spans and their metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

Span = tuple[int, int, str]


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
