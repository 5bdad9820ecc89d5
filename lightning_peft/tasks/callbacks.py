"""Callbacks of the recipes: best checkpoint, early stopping and samples."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from lightning_peft import engine
from lightning_peft.compat.lightning import last_saved_step, save_last
from lightning_peft.errors import ConfigError
from lightning_peft.generation import BATCH_SIZE, ready
from lightning_peft.plugin.interruption import SaveOnInterrupt
from lightning_peft.plugin.namespace import LateBoundMeta
from lightning_peft.plugin.optimization import log_info
from lightning_peft.plugin.restarts import MergeAndRestart
from lightning_peft.tasks.reference import moving_base
from lightning_peft.tasks.samples import GeneratedSample
from lightning_peft.tasks.tables import log_table

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as _Callback
    from pytorch_lightning.callbacks import EarlyStopping as _EarlyStopping
    from pytorch_lightning.callbacks import ModelCheckpoint as _ModelCheckpoint
else:
    _Callback = _EarlyStopping = _ModelCheckpoint = object


log = logging.getLogger(__name__)


class _MetricCheck(_Callback):
    """Refuses a metric that is never there, before the first step."""

    monitor: Any

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Checks that the first validation logs the metric."""
        known = [name for name in trainer.callback_metrics if name.startswith("val_")]
        if self.monitor.startswith("val_") and self.monitor not in known:
            raise ConfigError(
                f"{type(self).__name__}(monitor={self.monitor!r}): "
                f"{type(trainer.lightning_module).__name__} logs {', '.join(known)}."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks that there are validations; Lightning would say so after the first epoch."""
        if self.monitor.startswith("val_") and not sum(trainer.num_val_batches):
            raise ConfigError(
                f"{type(self).__name__}(monitor={self.monitor!r}) needs validation rows, and "
                "there are none. Give some (validation_share, validation_data), raise "
                "limit_val_batches, or remove the callback."
            )
        super().on_train_start(trainer, pl_module)


class BestCheckpoint(_MetricCheck, _ModelCheckpoint, metaclass=LateBoundMeta):
    """Keeps the checkpoint with the best value of a metric, and the last one.

    Lightning's ``ModelCheckpoint`` with the defaults of the recipes, for either Lightning package.

    Args:
        monitor: The metric.
        mode: Whether the least or the greatest value is best.
        save_top_k: How many of the best are kept.
        save_last: Whether the last one is kept besides.
        save_every: Also save the last one every so many optimizer steps, so that a crash costs no
            more; otherwise checkpoints are written after each validation and at the end.
        filename: Name of the file, with metrics in braces.
    """

    lightning_base = "callbacks.ModelCheckpoint"

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        save_every: int | None = None,
        filename: str = "best",
    ) -> None:
        super().__init__(
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            filename=filename,
            enable_version_counter=save_top_k > 1,
            save_on_train_epoch_end=False,
        )
        self.save_every = save_every

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves the last checkpoint every so many steps."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = trainer.global_step
        if self.save_every and step % self.save_every == 0 and step != last_saved_step(self):
            # Not counted, or a validation at this step would take the best checkpoint for saved.
            save_last(self, trainer, counted=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Saves what was learnt since the last validation, where training ended between two."""
        if any(getattr(callback, "saved", None) for callback in trainer.callbacks):
            # Interrupted: Lightning counts the epoch as done now, and the checkpoint to go on from
            # was written before.
            return
        super().on_train_end(trainer, pl_module)
        if last_saved_step(self) != trainer.global_step:
            save_last(self, trainer)


class StopEarly(_MetricCheck, _EarlyStopping, metaclass=LateBoundMeta):
    """Ends training when a metric has not improved for some validations.

    Lightning's ``EarlyStopping`` with the defaults of the recipes, for either Lightning package.

    Args:
        monitor: The metric.
        mode: Whether less or more is better.
        patience: How many validations without improvement are allowed.
        min_delta: Least change that counts as an improvement.
    """

    lightning_base = "callbacks.EarlyStopping"

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        # At the end of a training epoch there need not be a value yet.
        super().__init__(
            monitor=monitor,
            mode=mode,
            patience=patience,
            min_delta=min_delta,
            check_on_train_epoch_end=False,
        )


class LogSamples(_Callback, metaclass=LateBoundMeta):
    """Lets base and model generate for the first validation rows, the model with each validation.

    Where that would take too much of a run's time, at its end only: see
    :class:`ValidationBudget <lightning_peft.tasks.validation_budget.ValidationBudget>`.

    The base generates after the first step, which so comes earlier, with the adapters off; before
    training where the model without adapters is not what training starts from.

    The samples go into the record of the run (``samples.jsonl``) and, as a table, to loggers
    that take one: see :func:`~lightning_peft.tasks.log_table`.

    Args:
        count: How many rows.
        max_new_tokens: Longest generation in tokens.

    Raises:
        ConfigError: If ``count`` or ``max_new_tokens`` is less than 1.
    """

    lightning_base = "callbacks.Callback"

    def __init__(self, count: int = 3, max_new_tokens: int = 64) -> None:
        if count < 1 or max_new_tokens < 1:
            raise ConfigError(
                f"LogSamples(count={count}, max_new_tokens={max_new_tokens}): both are 1 at least. "
                "Leave the callback out for no samples."
            )
        self.count = count
        self.max_new_tokens = max_new_tokens
        # For the budget of a run: seconds so far, and whether there are samples at its end only.
        self.seconds = 0.0
        self.waits_for_end = False
        self._said = False
        self._refused: set[str] = set()
        # Whether the base generates after the first step.
        self._base_waits = False

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the base is still to generate, for a checkpoint."""
        return {"base_waits": self._base_waits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what was left to do when the run was interrupted."""
        self._base_waits = bool(state_dict.get("base_waits"))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks that module and data can give samples."""
        if not hasattr(pl_module, "generate_samples"):
            raise ConfigError(
                f"LogSamples needs a module that generates, and {type(pl_module).__name__} has no "
                "generate_samples(rows, max_new_tokens). Remove the callback, or add the method."
            )
        if not hasattr(trainer.datamodule, "read"):
            raise ConfigError(
                f"LogSamples takes its rows from a data module of this package, not from "
                f"{type(trainer.datamodule).__name__}. Remove the callback."
            )
        if self._is_impossible(trainer):
            log_info(
                trainer.strategy,
                "LogSamples: no samples with sharding: each process would end at another token.",
            )

    def _is_impossible(self, trainer: Any) -> bool:
        return bool(getattr(trainer.strategy, "shards_base", False))

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Generates with what the base model can do, or leaves it to the first step."""
        self._base_waits = not trainer.global_step and _is_base_without_adapters(trainer, pl_module)
        if not self._base_waits:
            self._generate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Generates with the base after the first step."""
        self.sample_base(trainer, pl_module)

    def sample_base(self, trainer: Any, pl_module: Any) -> bool:
        """Generates with the base, where that is due; returns whether it is still to come."""
        if self._base_waits and trainer.global_step and not _is_stopping(trainer):
            self._base_waits = not self._generate(trainer, pl_module, of_base=True)
        return self._base_waits

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Generates with what has been learnt so far."""
        # A run that stops early ends with this validation.
        due = not self.waits_for_end or trainer.should_stop
        if due and not trainer.sanity_checking:
            self._generate(trainer, pl_module)
            # Before the first step the model is the base.
            self._base_waits = self._base_waits and trainer.global_step > 0

    def _generate(self, trainer: Any, pl_module: Any, of_base: bool = False) -> bool:
        """Returns whether that is done; not with the base where the run is stopping."""
        rows = trainer.datamodule.read().splits.get("validation")
        if rows is None or self._is_impossible(trainer):
            return True
        samples: list[GeneratedSample] = []
        began = time.monotonic()
        count = min(self.count, len(rows))

        def say(line: str) -> None:
            if not self._said:
                log_info(trainer.strategy, line)
            self._said = True

        with trainer.precision_plugin.forward_context(), ready(pl_module, say):
            for start in range(0, count, BATCH_SIZE):
                for callback in trainer.callbacks:
                    before = getattr(callback, "on_validation_part", None)
                    if before is not None:
                        before(trainer, unit="samples", done=start, of=count)
                if of_base and _is_stopping(trainer):
                    return False
                some = [rows[place] for place in range(start, min(start + BATCH_SIZE, count))]
                # Not around the callbacks, which may save what is trained.
                with engine.disable_adapters(pl_module) if of_base else nullcontext():
                    samples += pl_module.generate_samples(some, self.max_new_tokens)
        self.seconds += time.monotonic() - began
        if trainer.is_global_zero:
            self._log(trainer, samples, 0 if of_base else trainer.global_step)
        return True

    def _log(self, trainer: Any, samples: list[GeneratedSample], step: int) -> None:
        for callback in trainer.callbacks:
            record = getattr(callback, "record_samples", None)
            if record is not None:
                record(samples, step)
        columns = ["prompt", "expected", "generated"]
        rows = [[sample.prompt, sample.expected, sample.generated] for sample in samples]
        for logger in trainer.loggers:
            kind = type(logger).__name__
            try:
                log_table(logger, "samples", columns, rows, step)
            except Exception as error:
                # A tracker that cannot be reached must not end the training.
                if kind not in self._refused:
                    log.warning("LogSamples: %s takes no samples: %r", kind, error)
                self._refused.add(kind)


def _is_stopping(trainer: Any) -> bool:
    ours = [one for one in trainer.callbacks if isinstance(one, SaveOnInterrupt)]
    return any(callback.is_stopping(trainer) for callback in ours)


def _is_base_without_adapters(trainer: Any, module: Any) -> bool:
    """Whether training starts from the base, and leaves it as it is."""
    return (
        engine.record_of(module) is not None
        and engine.adapters_have_no_effect(module)
        and not moving_base(module)
        and not any(isinstance(callback, MergeAndRestart) for callback in trainer.callbacks)
    )
