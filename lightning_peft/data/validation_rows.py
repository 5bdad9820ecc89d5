"""Selection of the validation rows used during a fit."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Subset

# Validation rows of a fit: as many as keep five validations, of a third of the cost of training on
# the same rows, below a tenth of all that is done with rows; and these at least.
VALIDATION_SHARE, LEAST_VALIDATION = 1 / 15, 200


def automatic_count(trainer: Any, known: int, rows: int, batch_size: int) -> int:
    """Returns how many of the ``known`` validation rows a fit on so many ``rows`` takes."""
    ends = []
    if trainer.max_epochs not in (None, -1):
        ends.append(rows * trainer.max_epochs)
    if trainer.max_steps != -1:
        step = batch_size * trainer.accumulate_grad_batches * trainer.world_size
        ends.append(trainer.max_steps * step)
    # Whoever limits batches has chosen.
    if not ends or trainer.limit_val_batches != 1.0:
        return known
    return min(known, max(LEAST_VALIDATION, round(VALIDATION_SHARE * min(ends))))


def spread(rows: Any, count: int) -> Any:
    """Returns ``count`` of the rows, spread evenly over them; all where there are no more."""
    if count >= len(rows):
        return rows
    return Subset(rows, [place * len(rows) // count for place in range(count)])
