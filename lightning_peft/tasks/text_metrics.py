"""Text metrics of torchmetrics, with their logged names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import (
    CharErrorRate,
    CHRFScore,
    ROUGEScore,
    SacreBLEUScore,
    WordErrorRate,
)

TextMetric = Literal["rouge", "bleu", "chrf", "wer", "cer"]


def _letters(text: str) -> str:
    # torchmetrics' own keeps a to z alone, so that other alphabets would score nothing.
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


# rougeLsum and stemming need data that is downloaded while a run goes on; they are left out.
METRICS: dict[TextMetric, Callable[[], Metric]] = {
    "rouge": lambda: ROUGEScore(
        normalizer=_letters, tokenizer=str.split, rouge_keys=("rouge1", "rouge2", "rougeL")
    ),
    "bleu": SacreBLEUScore,
    "chrf": lambda: CHRFScore(n_word_order=0),
    "wer": WordErrorRate,
    "cer": CharErrorRate,
}
_SEVERAL_REFERENCES = (SacreBLEUScore, CHRFScore)


def update(metric: Metric, generated: Sequence[str], expected: Sequence[str]) -> None:
    """Adds texts to a metric."""
    several = isinstance(metric, _SEVERAL_REFERENCES)
    metric.update(list(generated), [[text] for text in expected] if several else list(expected))


def named(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the results with F-measures under the metric's own name, and nothing else of it."""
    return {
        name.removesuffix("_fmeasure"): value
        for name, value in results.items()
        if not name.endswith(("_precision", "_recall"))
    }
