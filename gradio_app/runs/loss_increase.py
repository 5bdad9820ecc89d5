"""Detection of runs that end with a higher loss than before training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradio_app.runs.curves import relative_increase
from gradio_app.runs.files import number, object_below, read_json_object
from gradio_app.runs.metrics import Metrics
from gradio_app.runs.types import Run

# Less than one percent is noise.
_WORSE = 1.01


@dataclass(frozen=True)
class LossIncrease:
    """A loss at the start and now, maybe not finite, and the highest learning rate so far."""

    metric: str
    before: float
    after: float
    rate: float | None


def find_loss_increase(run: Run, metrics: Metrics) -> LossIncrease | None:
    """Returns how a run got worse, ``None`` for one that did not, or that has not been measured."""
    rates = [value for _, value in metrics.curve("learning_rate")]
    rate = max(rates, default=None)
    before, after = validation_losses(run)
    if after is None:
        validations = metrics.curve("val_loss")
        if validations and validations[0][0] == 0 and len(validations) > 1:
            before, after = validations[0][1], validations[-1][1]
    if before is not None and after is not None:
        return LossIncrease("val_loss", before, after, rate) if is_worse(before, after) else None
    levels = None if after is not None else relative_increase(metrics.curve("train_loss"))
    return LossIncrease("train_loss", *levels, rate) if levels else None


def finished_worse(run: Run) -> bool:
    """Whether a finished run's model is worse than its base, by the validation rows."""
    if run.status.state != "finished":
        return False
    before, after = validation_losses(run)
    return before is not None and after is not None and is_worse(before, after)


def is_worse(before: float, after: float) -> bool:
    """Whether a loss is worse than at the start, which was finite."""
    return math.isfinite(before) and not after <= before * _WORSE


def validation_losses(run: Run) -> tuple[float | None, float | None]:
    """Returns the validation loss before and after training that the result of a run has."""
    result = read_json_object(run.folder.result)
    before, after = object_below(result, "before"), object_below(result, "after")
    return number(before.get("val_loss")), number(after.get("val_loss"))
