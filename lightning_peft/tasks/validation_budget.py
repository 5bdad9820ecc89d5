"""Validation and sampling frequency within a time budget."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import LateBoundMeta
from lightning_peft.plugin.optimization import log_info
from lightning_peft.runs.recorder import RunRecorder
from lightning_peft.runs.schedule import Schedule, schedule_of
from lightning_peft.tasks.callbacks import BestCheckpoint, StopEarly

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as _Base
else:
    _Base = object

NAME = "validation"
# Seconds that are never too many: short runs validate as often as they may.
LEAST = 20.0
# Training batches that are timed, after a first one that is slower than the others.
TIMED = 8


class ValidationBudget(_Base, metaclass=LateBoundMeta):
    """Limits validation and samples to a share of a run's time, or 20 seconds.

    Where that is too little for ``most`` validations an epoch, the model generates samples at the
    end of training only; then validations become fewer, but one comes at the end of the run, also
    inside an epoch. It is decided once, from the first validation, the samples of the base and the
    first batches, and kept with checkpoints and in the record of a run.

    The Trainer's own ``val_check_interval`` and ``check_val_every_n_epoch`` win where they are not
    1, and in a config for the command line ``val_check_interval: 1.0`` does too. Nothing is changed
    where a scheduler, or a callback other than ``BestCheckpoint`` and ``StopEarly``, monitors a
    metric of the validation: those of Lightning count on its interval.

    Args:
        share: The share of the time of the run, between 0 and 1.
        most: Validations in an epoch, at most.

    Raises:
        ConfigError: If ``share`` is not between 0 and 1, or ``most`` is less than 1.
    """

    lightning_base = "callbacks.Callback"

    def __init__(self, share: float = 0.1, most: int = 4) -> None:
        super().__init__()
        if not 0 < share < 1 or most < 1:
            raise ConfigError(
                f"ValidationBudget(share={share}, most={most}): share is between 0 and 1, and most "
                "is 1 at least. Leave the callback out for validations at val_check_interval."
            )
        self.share, self.most = share, most
        self.decided: dict[str, Any] = {}
        self._validation: float | None = None
        self._began: float | None = None
        self._sampled = 0.0
        self._batches = 0
        self._since = self._trained = 0.0
        self._active = False
        # When validations come, where that is decided here.
        self.schedule: Schedule | None = None
        # The batch of the last validation, for those who resume there.
        self._validated_at: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the decision and the batch of the last validation, for a checkpoint."""
        return {NAME: self.decided.get(NAME), "validated_at": self._validated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what was decided before the run was interrupted."""
        self._validated_at = state_dict.get("validated_at")
        if state_dict.get(NAME):
            self.decided[NAME] = dict(state_dict[NAME])

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins to time a validation; says to those who sample whether it is one for samples."""
        self._began, self._sampled = time.monotonic(), _sampling_seconds(trainer)
        if not trainer.sanity_checking:
            self._validated_at = trainer.fit_loop.epoch_loop.total_batch_idx
        known = self.decided.get(NAME, {}).get("samples") if self._active else None
        for callback in _sampling(trainer):
            callback.waits_for_end = known == "at the end" and not _is_last(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Validates as was decided, else at first as often as it may be."""
        self._end_validation(trainer)
        if trainer.num_sanity_val_steps != math.inf:
            # A few rows do not tell the time of all.
            self._validation = None
        self._batches, self._trained = 0, 0.0
        validates = sum(trainer.num_val_batches) if trainer.num_val_batches else True
        countable = isinstance(trainer.num_training_batches, int)
        is_open = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
        self.schedule = None
        self._active = bool(is_open and trainer.enable_validation and validates and countable)
        others = _monitoring(trainer) if self._active else []
        if others:
            self._active = False
            log_info(
                trainer.strategy,
                f"ValidationBudget leaves the run with one validation an epoch, which "
                f"{', '.join(others)} counts on.",
            )
        if not self._active:
            return
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecorder):
                callback.decided.update(self.decided)
                self.decided = callback.decided
        # Only the first process has the record of a run.
        known = trainer.strategy.broadcast(self.decided.get(NAME))
        if known is not None:
            self.decided[NAME] = known
        self._apply(trainer, known or self._undecided)
        self._set_next(trainer)
        epoch_loop = trainer.fit_loop.epoch_loop
        validated = self._validated_at == epoch_loop.total_batch_idx
        if validated or self._is_due(trainer, epoch_loop.batch_idx):
            # Lightning has to know that it resumes behind a validation.
            trainer.val_check_batch = max(1, epoch_loop.batch_idx + 1)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Sets whether this epoch validates."""
        if self._active:
            self._set_next(trainer)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the time of a validation, checkpoints included, and begins that of a batch."""
        self._end_validation(trainer)
        if self._active:
            self._set_next(trainer, batch_idx, _steps_of(trainer, batch_idx))
            if NAME not in self.decided:
                self._since = _now(pl_module) - _sampling_seconds(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Times the first batches, and decides before the next validation."""
        if self._active:
            self._time_batch(trainer, pl_module, batch_idx)
            self._set_next(trainer, batch_idx)

    def _time_batch(self, trainer: Any, pl_module: Any, batch_idx: int) -> None:
        if NAME in self.decided:
            return
        # Now, for their time is a part of the decision.
        waiting = [callback.sample_base(trainer, pl_module) for callback in _sampling(trainer)]
        self._batches += 1
        if self._batches == 1:
            return
        self._trained += _now(pl_module) - _sampling_seconds(trainer) - self._since
        soon = (batch_idx + 1) % trainer.val_check_batch == 0
        if self._validation is None or any(waiting):
            return
        if soon or self._batches > TIMED:
            self._decide(trainer, self._trained / (self._batches - 1))

    def _end_validation(self, trainer: Any) -> None:
        if self._began is not None:
            sampled = _sampling_seconds(trainer) - self._sampled
            self._validation = time.monotonic() - self._began - sampled
            self._began, self._sampled = None, sampled

    def _decide(self, trainer: Any, batch: float) -> None:
        assert self._validation is not None
        self._sampled = self._sampled or _sampling_seconds(trainer)
        total = trainer.estimated_stepping_batches
        batches = trainer.num_training_batches
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        epochs = 1.0 if math.isinf(total) else total / steps
        choice = self.choose(epochs, batches * batch)
        choice |= {
            "batch_seconds": round(batch, 4),
            "validation_seconds": round(self._validation, 3),
            "samples_seconds": round(self._sampled, 3),
            "share": self.share,
        }
        choice = trainer.strategy.broadcast(choice)
        self.decided[NAME] = choice
        self._apply(trainer, choice)
        if choice["samples"] != "with each":
            log_info(trainer.strategy, describe(choice, batches))

    @property
    def _undecided(self) -> dict[str, Any]:
        return {"per_epoch": self.most, "every_epochs": 1}

    def _apply(self, trainer: Any, choice: dict[str, Any]) -> None:
        batches, total = trainer.num_training_batches, trainer.estimated_stepping_batches
        self.schedule = Schedule(
            batches,
            trainer.accumulate_grad_batches,
            per_epoch=min(choice["per_epoch"], batches),
            epochs=choice["every_epochs"],
            last=None if math.isinf(total) else int(total),
        )

    def _set_next(self, trainer: Any, batch: int = -1, steps: int = 0) -> None:
        """Lets Lightning validate where it is due; ``steps`` are those that the batch will add.

        ``check_val_every_n_epoch`` stays: ModelCheckpoint goes by it, as do runs that stop early.
        """
        assert self.schedule is not None
        if self.schedule.accumulated != trainer.accumulate_grad_batches:
            # Memory was short, and batches are smaller.
            self._apply(trainer, self.decided.get(NAME) or self._undecided)
        due = _is_end(trainer, batch, steps) or self._is_due(trainer, batch)
        trainer.val_check_batch = batch + 1 if due else trainer.num_training_batches + 1

    def _is_due(self, trainer: Any, batch: int) -> bool:
        """Whether a validation comes after a batch of the epoch; -1 is none."""
        assert self.schedule is not None
        in_epoch = (trainer.current_epoch + 1) % (self.schedule.epochs or 1) == 0
        inside = self.schedule.inside
        return in_epoch and batch >= 0 and inside(batch + 1) > inside(batch)

    def choose(self, epochs: float, epoch: float) -> dict[str, Any]:
        """Returns how often a run of ``epochs`` of so many seconds validates and samples.

        ``per_epoch`` validations in every ``every_epochs``-th epoch, and ``samples``, which come
        ``"with each"`` validation or ``"at the end"``.
        """
        validation, samples = self._validation or 0.0, self._sampled
        # Validation and samples before training count as well.
        allowed = max(LEAST, self.share / (1 - self.share) * epochs * epoch) - validation - samples
        whole = max(1, math.ceil(epochs))
        choices = [(self.most, 1, "with each")]
        choices += [(count, 1, "at the end") for count in range(self.most, 1, -1)]
        # So that the last epoch is among them in any case.
        choices += [(1, every, "at the end") for every in range(1, whole + 1) if whole % every == 0]
        for per_epoch, every, when in choices:
            count = math.ceil(epochs * per_epoch / every)
            sampled = (count if when == "with each" else 1) * samples
            if count * validation + sampled <= allowed:
                break
        return {"per_epoch": per_epoch, "every_epochs": every, "samples": when}


def describe(choice: dict[str, Any], batches: int) -> str:
    """Returns the line that says what was decided, and why."""
    times = {1: "once", 2: "twice"}.get(choice["per_epoch"], f"{choice['per_epoch']} times")
    every = choice["every_epochs"]
    often = f"{times} an epoch" if every == 1 else f"every {every} epochs"
    sampled = choice["samples_seconds"]
    takes = f", samples {sampled:.1f} s," if sampled else ""
    generates = f" and generates samples {choice['samples']}" if sampled else ""
    return (
        f"Validation and samples get {choice['share']:.0%} of the run's time, or {LEAST:.0f} s in "
        f"short runs: a validation takes {choice['validation_seconds']:.1f} s{takes} and an epoch "
        f"of training about {choice['batch_seconds'] * batches:.0f} s. The run validates {often}"
        f"{generates}; trainer.val_check_interval sets another interval."
    )


def _monitoring(trainer: Any) -> list[str]:
    """Returns the callbacks and schedulers that rely on a validation at the end of each epoch."""
    ours = (BestCheckpoint, StopEarly)
    named = [(one, getattr(one, "monitor", None)) for one in trainer.callbacks]
    named = [(one, monitor) for one, monitor in named if not isinstance(one, ours)]
    named += [(c.scheduler, c.monitor) for c in trainer.lr_scheduler_configs if c.reduce_on_plateau]
    return [
        f"{type(one).__name__}(monitor={monitor!r})"
        for one, monitor in named
        if isinstance(monitor, str) and not monitor.startswith("train")
    ]


def _steps_of(trainer: Any, batch: int) -> int:
    """Returns the optimizer steps that end with a batch."""
    whole = batch + 1 >= trainer.num_training_batches
    return int(whole or (batch + 1) % trainer.accumulate_grad_batches == 0)


def _is_end(trainer: Any, batch: int, steps: int) -> bool:
    """Whether training ends with a batch that adds so many optimizer steps."""
    if batch < 0:
        return False
    if trainer.max_steps != -1 and trainer.global_step + steps >= trainer.max_steps:
        return True
    whole = batch + 1 >= trainer.num_training_batches
    return whole and trainer.max_epochs != -1 and trainer.current_epoch + 1 >= trainer.max_epochs


def _sampling(trainer: Any) -> list[Any]:
    return [one for one in trainer.callbacks if hasattr(one, "waits_for_end")]


def _sampling_seconds(trainer: Any) -> float:
    return sum(callback.seconds for callback in _sampling(trainer))


def _is_last(trainer: Any) -> bool:
    """Whether no validation comes after this one, as far as that is known."""
    total, schedule = trainer.estimated_stepping_batches, schedule_of(trainer)
    if schedule is None or math.isinf(total):
        return False
    return schedule.until(int(total)) <= schedule.until(trainer.global_step)


def _now(module: Any) -> float:
    if module.device.type == "cuda":
        # Else it is the time at which the work was handed over.
        torch.cuda.synchronize(module.device)
    return time.monotonic()
