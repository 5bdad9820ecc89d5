"""Recovery from out-of-memory errors with smaller batches and more accumulation.

The fit goes on: the loop goes back to where the optimizer stepped last, in the order of the data
and in the random numbers, and trains the same rows again in smaller batches.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_peft import engine
from lightning_peft.compat.lightning import (
    combined_loader,
    data_fetcher,
    end_restart,
    fetches_batches,
)
from lightning_peft.compat.torch import set_batch_size
from lightning_peft.errors import LifecycleError, UnsupportedError, itemize
from lightning_peft.plugin.failure_notice import FailureNotice
from lightning_peft.plugin.mid_epoch import epoch_sums, put_back_sums
from lightning_peft.plugin.random_state import random_state, set_random_state
from lightning_peft.plugin.restart_record import RestartRecord, division_in
from lightning_peft.plugin.step_agreement import StepAgreement, process_problems
from lightning_peft.plugin.tracked_loader import is_stateful, length_of

log = logging.getLogger(__name__)


class _Loops(Protocol):
    """What is needed here of :class:`lightning_peft.plugin.loops.TrainingLoops`."""

    fit: Any
    epoch: Any
    resumed: dict[str, Any] | None
    sums: dict[str, Any]
    tracked_loaders: list[Any]

    @property
    def is_trial(self) -> bool: ...


@dataclass
class _Full:
    """What the user asked for, in batches of the size that the user gave."""

    loader: Any
    batch_size: int
    limit: float
    val_check_batch: Any


@dataclass
class _StepStart:
    """Where training was before the first batch of an optimizer step."""

    random: dict[str, Any]
    place: dict[str, Any]
    buffers: list[tuple[Tensor, Tensor]]
    sums: dict[str, dict[str, Tensor]]
    sums_before: dict[str, Any]
    batches: int
    total: int


class SmallerBatches:
    """The batches of one fit: as the user wants them, or as they fit into memory.

    Attributes:
        division: By what the number of rows in a batch is divided, and the number of batches for
            an optimizer step multiplied.
    """

    def __init__(self, loops: _Loops, failures: FailureNotice, halves: bool) -> None:
        self.division = 1
        self._loops, self._failures, self._halves = loops, failures, halves
        self.trainer = loops.fit.trainer
        self._accumulate: int = self.trainer.accumulate_grad_batches
        self._full: _Full | None = None
        self._frequencies: list[int] = []
        self._start: _StepStart | None = None
        self._may_have_stepped = False
        self._agreement: StepAgreement | None = None
        # Of a sharded base, where processes cannot leave a batch together.
        sharded = halves and self.trainer.strategy.shards_base
        self.restart = RestartRecord(self.trainer) if sharded else None

    def state(self) -> dict[str, int] | None:
        """Returns the entry of a checkpoint; ``None`` where batches are as the user wants."""
        if self.division == 1:
            return None
        return {"division": self.division, "accumulate": self._accumulate * self.division}

    def set_up(self) -> None:
        """Looks at new loaders; those of a run that is resumed get batches as it had them.

        Raises:
            UnsupportedError: If batches cannot be made smaller.
        """
        self.division = max(self.division, division_in(self._loops.resumed, self._accumulate))
        if not self._halves and self.division == 1:
            return
        problems = self._problems()
        if problems:
            raise UnsupportedError(
                "halve_batch_on_oom=True cannot be used with:" + itemize(problems)
            )
        (loader,) = combined_loader(self._loops.fit).flattened
        (limit,) = combined_loader(self._loops.fit).limits
        if self.restart is not None:
            self.division = max(self.division, self.restart.division(loader.batch_size))
        self._full = _Full(loader, loader.batch_size, limit, self.trainer.val_check_batch)
        if self.division > 1:
            self._scale(self.division)
            # Again, up to the new number of batches; nothing was fetched yet.
            iter(data_fetcher(self._loops.fit))

    def give_back(self) -> None:
        """Called before loaders are asked for, which may be the same: they get the user's size."""
        if self._full is not None:
            set_batch_size(self._full.loader, self._full.batch_size)

    def start(self) -> None:
        """Called when training starts, after the LR schedulers were made."""
        self._frequencies = [config.frequency for config in self.trainer.lr_scheduler_configs]
        if self._full is not None and self.division > 1:
            self._scale(self.division)
        several = self.trainer.world_size > 1 and self.restart is None
        if self._halves and several and not self._loops.is_trial:
            self._agreement = StepAgreement(self.trainer, self._failures)

    def stop(self) -> None:
        """Gives Trainer and loader what the user gave them."""
        self._start = None
        if self._agreement is not None:
            self._agreement.stop()
            self._agreement = None
        if self._full is not None and self.division > 1:
            self._scale(1)
        self._full = None

    def advance(self, fetcher: Any) -> None:
        """Trains on one batch, a smaller one where it has to be.

        Raises:
            LifecycleError: If memory is short and a smaller batch is none, or would not help.
        """
        epoch = self._loops.epoch
        current = epoch.batch_progress.current
        halves = self._halves and not self._loops.is_trial
        if (
            halves
            and self.restart is None
            and current.ready % self.trainer.accumulate_grad_batches == 0
        ):
            self._start = self._step_start()
        while True:
            self._may_have_stepped = False
            if self._agreement is not None:
                self._agreement.begin()
            if self.division > 1:
                last = current.ready + 1 >= self._loops.fit.max_batches
                self._set_intervals(self.division, last)
            try:
                type(epoch).advance(epoch, fetcher)
                return
            except torch.OutOfMemoryError as error:
                if not halves:
                    raise
                factor = self._factor(error)
                reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else ""
                if self.restart is not None:
                    assert self._full is not None
                    size, division = self._full.batch_size, self.division * factor
                    raise self.restart.end(size, division, reason) from error
            # Not before: the traceback holds what the step computed.
            self._go_back(factor, reason)

    def watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Returns ``closure``, after which the optimizer changes parameters."""

        def run() -> Any:
            if self._agreement is not None:
                self._agreement.begin_closure()
            result = closure()
            self._may_have_stepped = True
            return result

        return run

    def _problems(self) -> list[str]:
        trainer, module = self.trainer, self.trainer.lightning_module
        loaders = combined_loader(self._loops.fit).flattened
        problems = []
        if trainer.world_size > 1 and self._halves:
            limits = combined_loader(self._loops.fit).limits
            problems += process_problems(trainer, (getattr(loaders[0], "batch_size", 0), limits[0]))
        if not module.automatic_optimization:
            problems.append("manual optimization, whose steps only training_step knows")
        if not fetches_batches(data_fetcher(self._loops.fit)):
            problems.append("a training_step that fetches its batches itself (dataloader_iter)")
        if getattr(module, "couples_rows", False):
            problems.append(
                f"{type(module).__name__}, whose loss compares the rows of a batch with each "
                "other: a smaller batch is another loss"
            )
        record = engine.record_of(module)
        if record is not None and record.momentum_copies:
            problems.append("momentum copies, which may move with each batch")
        names = {cls.__name__ for one in trainer.callbacks for cls in type(one).__mro__}
        if "GradientAccumulationScheduler" in names:
            problems.append("GradientAccumulationScheduler, which sets the same number")
        if len(loaders) != 1:
            problems.append(f"{len(loaders)} training loaders: combine them into one")
        texts = [_loader_problem(one) for one in loaders[:1]]
        if texts == [None] and self._counts_on(loaders[0]):
            texts = [
                "check_val_every_n_epoch=None and a last batch that is not full: validations count "
                "the batches of all epochs, and these would be other ones. Use drop_last=True"
            ]
        return problems + [text for text in texts if text is not None]

    def _counts_on(self, loader: Any) -> bool:
        """Whether validations come by the number of batches in all epochs, which changes."""
        trainer = self.trainer
        if trainer.check_val_every_n_epoch is not None or trainer.val_check_batch is None:
            return False
        whole = loader.drop_last or len(loader.sampler) % loader.batch_size == 0
        (limit,) = combined_loader(self._loops.fit).limits
        return bool(trainer.enable_validation and not whole and limit == len(loader))

    def _step_start(self) -> _StepStart:
        progress = self._loops.epoch.batch_progress
        (tracked,) = self._loops.tracked_loaders
        module = self.trainer.lightning_module
        return _StepStart(
            random_state(),
            tracked.position(0, between_epochs=progress.current.ready == 0),
            [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_meta],
            epoch_sums(self._loops.epoch),
            dict(self._loops.sums),
            progress.current.ready,
            progress.total.ready,
        )

    def _factor(self, error: torch.OutOfMemoryError) -> int:
        """Returns by what a batch is divided next."""
        assert self._full is not None
        size = self._full.batch_size // self.division
        problem = None
        # First, so that all processes end with an error where this one does.
        if self._agreement is not None and not self._agreement.leaves(error):
            problem = (
                "the other processes have had memory for the batch, and end too. It was short in "
                "the optimizer's step, or in a hook after it. Continue from the newest checkpoint "
                "with a smaller batch_size"
            )
        elif size == 1:
            problem = "the batch is one row. Shorten rows (max_length), or plan for less memory"
        elif self._may_have_stepped and self.restart is None:
            problem = (
                "it was the optimizer's step, which may have changed some parameters and not "
                "others. Continue from the newest checkpoint with another optimizer, such as "
                "optimizer='paged_adamw_8bit', or a smaller r"
            )
        elif self._start is None and self.restart is None:
            problem = (
                "the run was resumed between two batches of an optimizer step, whose first rows "
                "are gone. Continue from a checkpoint of an optimizer step"
            )
        if problem is not None:
            raise LifecycleError(
                f"Out of memory, and a smaller batch does not help: {problem}."
            ) from error
        # Of 6 rows 3, of 9 rows 3, of 5 rows 1: an optimizer step keeps its rows.
        return next(n for n in range(2, size + 1) if size % n == 0)

    def _go_back(self, factor: int, reason: str) -> None:
        """Goes to the start of the optimizer step, with batches that are smaller by ``factor``."""
        start, full, trainer, epoch = self._start, self._full, self.trainer, self._loops.epoch
        assert start is not None
        assert full is not None
        rows, batches = full.batch_size // self.division, trainer.accumulate_grad_batches
        self.division *= factor
        for param in trainer.lightning_module.parameters():
            param.grad = None
        gc.collect()
        torch.cuda.empty_cache()
        for buffer, value in start.buffers:
            buffer.copy_(value)
        put_back_sums(epoch, start.sums)
        self._loops.sums = dict(start.sums_before)
        self._scale(self.division)
        start.batches, start.total = start.batches * factor, start.total * factor
        self._set_progress(start)
        start.place = {**start.place, "yielded": start.place["yielded"] * factor}
        (tracked,) = self._loops.tracked_loaders
        tracked.resume_at = start.place
        set_random_state(start.random)
        fetcher = data_fetcher(self._loops.fit)
        iter(fetcher)
        fetcher.fetched += start.batches
        log.warning(
            "Out of memory after optimizer step %d (%s). From here on a batch has %d rows instead "
            "of %d, and an optimizer step %d batches instead of %d: the same rows. Training goes "
            "on after that step.",
            trainer.global_step,
            reason,
            rows // factor,
            rows,
            batches * factor,
            batches,
        )

    def _set_progress(self, start: _StepStart) -> None:
        epoch = self._loops.epoch
        end_restart(epoch)
        progress = epoch.batch_progress
        for tracker, count in ((progress.current, start.batches), (progress.total, start.total)):
            tracker.ready = tracker.started = tracker.processed = tracker.completed = count
        progress.is_last_batch = False
        optimizer = epoch.automatic_optimization.optim_progress.optimizer
        for tracked in (optimizer.step, optimizer.zero_grad):
            tracked.total.reset_on_restart()
            tracked.current.reset_on_restart()

    def _scale(self, division: int) -> None:
        """Counts in batches that are ``division`` times smaller than the user's."""
        full, fit = self._full, self._loops.fit
        assert full is not None
        set_batch_size(full.loader, full.batch_size // division)
        limit = min(full.limit * division, len(full.loader))
        for combined in (combined_loader(fit), data_fetcher(fit).combined_loader):
            combined.limits = [limit]
        fit.max_batches = limit
        self.trainer.accumulate_grad_batches = self._accumulate * division
        self._set_intervals(division)

    def _set_intervals(self, division: int, last: bool = False) -> None:
        """Lets validations and steps of LR schedulers come after the same rows.

        What comes with the user's ``last`` batch comes with the last of the smaller ones: where it
        has fewer rows, it is divided into fewer batches.
        """
        full, trainer, limit = self._full, self.trainer, self._loops.fit.max_batches
        assert full is not None

        def scaled(every: int) -> int:
            return limit if last and full.limit % every == 0 else every * division

        if full.val_check_batch not in (None, float("inf")):
            checks = scaled(full.val_check_batch)
            in_epoch = trainer.check_val_every_n_epoch is not None
            trainer.val_check_batch = min(checks, limit) if in_epoch else checks
        for config, frequency in zip(trainer.lr_scheduler_configs, self._frequencies, strict=False):
            if config.interval == "step" and frequency > 1:
                config.frequency = scaled(frequency)


def _loader_problem(loader: Any) -> str | None:
    """Returns why batches of a loader cannot be made smaller, or ``None``."""
    if not isinstance(loader, DataLoader):
        return f"{type(loader).__name__} as a loader: only torch's DataLoader can be rebuilt"
    if isinstance(loader.dataset, IterableDataset):
        return "an IterableDataset, which cannot be asked for rows again"
    if is_stateful(loader):
        return f"{type(loader).__name__}, which goes on by a state of its own. Use DataLoader"
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        kind = type(loader.batch_sampler).__name__
        return f"batch_sampler={kind}, whose batches only it can make smaller. Use batch_size"
    if length_of(loader) is None:
        return f"sampler={type(loader.sampler).__name__}, which has no length: give it one"
    return None
