"""Alerts about training problems, from logged metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Losses of single batches jump; means of so many rows in a row are compared.
SMOOTHED_OVER = 10
# How far above its least mean the training loss must be to be called diverging.
DIVERGED = 1.5
# Validations in a row with a rising loss.
RISING = 2


@dataclass(frozen=True)
class Alert:
    """One thing that the user should look at."""

    # "nan", "diverging" or "overfitting".
    kind: str
    text: str
    # For programs that say it in words of their own: `of` is the name of the metric; `first`,
    # `last` and `times` are its values and how often it rose.
    seen: Mapping[str, Any] = field(default_factory=dict)


def training_alert(losses: Sequence[float]) -> Alert | None:
    """Returns the alert that the training losses call for, or ``None``."""
    if losses and not math.isfinite(losses[-1]):
        return Alert(
            "nan",
            f"The training loss is {losses[-1]}. Usual reasons: a learning rate that is too high, "
            "16-mixed precision (try bf16-mixed), or rows without a trained token.",
            {"of": "train_loss"},
        )
    means = [
        sum(losses[end - SMOOTHED_OVER : end]) / SMOOTHED_OVER
        for end in range(SMOOTHED_OVER, len(losses) + 1, SMOOTHED_OVER)
    ]
    if len(means) > 1 and min(means) > 0 and means[-1] > DIVERGED * min(means):
        return Alert(
            "diverging",
            f"The training loss has risen from {min(means):.3g} to {means[-1]:.3g}. A lower "
            "learning rate or more warm-up usually helps.",
            {"of": "train_loss", "first": min(means), "last": means[-1]},
        )
    return None


def validation_alert(losses: Sequence[float]) -> Alert | None:
    """Returns the alert that the validation losses call for, or ``None``."""
    if losses and not math.isfinite(losses[-1]):
        return Alert("nan", f"The validation loss is {losses[-1]}.", {"of": "val_loss"})
    last = losses[-1 - RISING :]
    rising = all(a < b for a, b in zip(last, last[1:], strict=False))
    if len(last) > RISING and rising:
        return Alert(
            "overfitting",
            f"The validation loss has risen {RISING} times in a row, from {last[0]:.4g} to "
            f"{last[-1]:.4g}: the model learns the training rows by heart. The best checkpoint is "
            "kept; fewer epochs, more data, more dropout or a lower rank help.",
            {"of": "val_loss", "first": last[0], "last": last[-1], "times": RISING},
        )
    return None
