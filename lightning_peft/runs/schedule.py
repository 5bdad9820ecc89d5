"""Validation schedule of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """When validations come."""

    # Training batches of an epoch, and of an optimizer step.
    batches: int
    accumulated: int = 1
    # Batches between two validations; None for as many in an epoch as below.
    every: int | None = None
    # Validations come in every so many epochs; None where batches are counted over the ends of
    # epochs.
    epochs: int | None = 1
    # The optimizer step with which training ends, where that is always validated.
    last: int | None = None
    # Validations in an epoch, the last one at its end.
    per_epoch: int = 1

    def until(self, step: int) -> int:
        """Returns how many validations there are until optimizer step ``step``, with its own."""
        if self.last is None or step < self.last:
            return self._regular(step)
        return max(self._regular(step), self._regular(self.last - 1) + 1)

    def _regular(self, step: int) -> int:
        steps = math.ceil(self.batches / self.accumulated)
        whole, rest = divmod(step, steps)
        batches = min(rest * self.accumulated, self.batches)
        if self.epochs is None:
            return (whole * self.batches + batches) // (self.every or self.batches)
        validations = whole // self.epochs * self.inside(self.batches)
        return validations + (self.inside(batches) if (whole + 1) % self.epochs == 0 else 0)

    def inside(self, batches: int) -> int:
        """Returns how many validations there are in so many batches of an epoch."""
        if self.every is not None:
            return batches // self.every
        return batches * self.per_epoch // self.batches


def schedule_of(trainer: Any) -> Schedule | None:
    """Returns when a Trainer validates; ``None`` if it does not, or that cannot be known."""
    for callback in trainer.callbacks:
        decided = getattr(callback, "schedule", None)
        if isinstance(decided, Schedule):
            return decided
    batches, every = trainer.num_training_batches, trainer.val_check_batch
    # Before the first validation Lightning need not have counted its batches.
    known = trainer.num_val_batches
    validates = sum(known) if known else trainer.enable_validation
    if not validates or not isinstance(batches, int) or not batches:
        return None
    if isinstance(every, float) and math.isinf(every):
        every = None
    elif not isinstance(every, int):
        return None
    epochs = trainer.check_val_every_n_epoch
    return Schedule(batches, trainer.accumulate_grad_batches, every, epochs)


def validation_rows(trainer: Any, dataloader_idx: int = 0) -> tuple[int, int] | None:
    """Returns rows of a batch and of all of a validation loader; ``None`` where not known."""
    loaders = trainer.val_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
    try:
        batches, size = len(loader), loader.batch_size
        rows = len(loader.dataset)
    except (AttributeError, TypeError):
        return None
    # Fewer where the Trainer limits them, or processes share them.
    whole = sum(trainer.num_val_batches) == batches and trainer.world_size == 1
    return (int(size), rows) if whole and isinstance(size, int) else None
