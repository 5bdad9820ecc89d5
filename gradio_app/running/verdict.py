"""Whether a run has made its model worse than it was before training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradio_app.running.curves import risen
from gradio_app.running.metrics import Metrics
from gradio_app.running.reading import json_object
from gradio_app.running.store import Run

# Less than one percent is noise.
_WORSE = 1.01


@dataclass(frozen=True)
class Verdict:
    """A run that got worse.

    Attributes:
        metric: ``"val_loss"``, or ``"train_loss"`` where there is no validation.
        before: Its value at the start.
        after: Its value now; may be infinite or not a number.
        rate: The highest learning rate so far, where that is known.
    """

    metric: str
    before: float
    after: float
    rate: float | None


def got_worse(run: Run, metrics: Metrics) -> Verdict | None:
    """Returns how a run got worse, ``None`` for one that did not, or that has not been measured.

    Args:
        run: The run.
        metrics: Its numbers.
    """
    rates = [value for _, value in metrics.curve("learning_rate")]
    rate = max(rates, default=None)
    before, after = measured(run)
    if after is None:
        validations = metrics.curve("val_loss")
        if validations and validations[0][0] == 0 and len(validations) > 1:
            before, after = validations[0][1], validations[-1][1]
    if before is not None and after is not None:
        return Verdict("val_loss", before, after, rate) if is_worse(before, after) else None
    levels = None if after is not None else risen(metrics.curve("train_loss"))
    return Verdict("train_loss", *levels, rate) if levels else None


def ended_worse(run: Run) -> bool:
    """Says whether a finished run's model is worse than its base, by the validation rows."""
    if run.status.state != "finished":
        return False
    before, after = measured(run)
    return before is not None and after is not None and is_worse(before, after)


def is_worse(before: float, after: float) -> bool:
    """Says whether a loss is worse than at the start, which was finite."""
    return math.isfinite(before) and not after <= before * _WORSE


def measured(run: Run) -> tuple[float | None, float | None]:
    """Returns the validation loss before and after training that the result of a run has."""
    result = json_object(run.folder.result)
    before, after = (_loss(result.get(part)) for part in ("before", "after"))
    return before, after


def _loss(numbers: Any) -> float | None:
    value = numbers.get("val_loss") if isinstance(numbers, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None
