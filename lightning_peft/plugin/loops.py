"""Temporary extensions of Lightning's training and validation loops.

Lightning has no hooks where these are needed: before the first batch is fetched, around the random
numbers of validation, and around the end of an epoch. So methods of the loop objects are extended,
on the objects only, and given back when the fit ends.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

from lightning_peft import engine
from lightning_peft.compat.lightning import (
    HOOK_CALLERS,
    LOAD_LOADER_STATES,
    combined_loader,
    data_fetcher,
    drop_loaders,
    end_restart,
    is_tuning,
    loader_states,
    reloads_training_data,
    restore_loader_states,
)
from lightning_peft.plugin.failure_notice import FailureNotice
from lightning_peft.plugin.mid_epoch import merge_epoch_sums, mid_epoch_state, restore_mid_epoch
from lightning_peft.plugin.random_state import random_state, same_state, set_random_state
from lightning_peft.plugin.smaller_batches import SmallerBatches
from lightning_peft.plugin.tracked_loader import (
    TrackedLoader,
    generator_states,
    is_stateful,
    next_epoch_position,
    set_generator_states,
)

_EPOCH_END = "end of the epoch"
_METHODS = (
    ("fit", "run"),
    ("fit", "setup_data"),
    ("fit", LOAD_LOADER_STATES),
    ("fit", "on_advance_end"),
    ("epoch", "advance"),
    ("epoch", "reset"),
    ("validation", "run"),
    ("validation", "increment_progress_to_evaluation_end"),
)


class TrainingLoops:
    """The loops of one Trainer while it fits.

    Attributes:
        fit: Lightning's loop over epochs.
        epoch: Its loop over batches.
        validation: Its validation.
        resumed: What a checkpoint says of this process, from the restore until training starts.
        mid_epoch: Whether Lightning resumes inside an epoch.
        ending_epoch: Whether the hooks of an epoch's end are running.
        training_random: Training's random state while validation runs, else ``None``.
        sums: What was logged for the epoch before the checkpoint, and is not yet added.
        tracked_loaders: The loaders that training iterates over.
        batches: Their batches, which become smaller where memory is short and ``halves`` is set.
    """

    def __init__(self, trainer: Any, failures: FailureNotice, halves: bool = False) -> None:
        self.fit = trainer.fit_loop
        self.epoch = self.fit.epoch_loop
        self.validation = self.epoch.val_loop
        self.resumed: dict[str, Any] | None = None
        self.mid_epoch = False
        self.ending_epoch = False
        self.training_random: dict[str, Any] | None = None
        self.sums: dict[str, Any] = {}
        self.tracked_loaders: list[Any] = []
        self._user_loaders: list[Any] = []
        self._loader_random: dict[str, Any] | None = None
        self._validation_generators: Any = None
        self._final_prefetch: tuple[int, int] | None = None
        self._had_callbacks = False
        self._failures = failures
        self.batches = SmallerBatches(self, failures, halves)

    def attach(self) -> None:
        """Extends the loops."""
        self._final_prefetch = None
        self._had_callbacks = bool(self.fit.trainer.callbacks)
        for loop, method in _METHODS:
            owner = getattr(self, loop)
            owner.__dict__[method] = partial(getattr(self, f"_{loop}_{method.strip('_')}"))

    def detach(self) -> None:
        """Gives the loops their own methods back."""
        if self._final_prefetch is None:
            # Lightning empties its counters next, and checkpoints may still be saved.
            self._final_prefetch = self._prefetched()
        for loop, method in _METHODS:
            getattr(self, loop).__dict__.pop(method, None)
        combined = combined_loader(self.fit)
        if combined is not None and self.tracked_loaders:
            combined._iterator = None
        self.batches.stop()

    @property
    def is_trial(self) -> bool:
        """Whether Lightning's tuner tries something and puts the weights back afterwards."""
        return is_tuning(self.fit.trainer, self._had_callbacks)

    def resume(self, mine: dict[str, Any], mid_epoch: bool) -> None:
        """Says, before any data is asked for, where the fit goes on, from a :meth:`state`."""
        self.resumed, self.mid_epoch = mine, mid_epoch
        self._validation_generators = mine.get("validation")

    def start(self) -> None:
        """Puts the rest back, the latest moment before the first batch; the random state last."""
        resumed, self.resumed, fit = self.resumed, None, self.fit
        self.batches.start()
        if (
            fit.restarted_mid_epoch
            and self.epoch.restarted_on_train_batch_end
            and self.epoch.batch_progress.is_last_batch
        ):
            # Lightning begins the next epoch and does not count that. A checkpoint inside of it
            # would be taken for one at its end, and the rest of it would not be trained.
            fit.epoch_progress.increment_ready()
            fit.epoch_progress.increment_started()
        if resumed is None:
            return
        if fit.restarting and loader_states(fit):
            # The loaders were made before Lightning knew that it resumes.
            restore_loader_states(fit)
            iter(data_fetcher(fit))
        if "unfinished" in resumed:
            restore_mid_epoch(self, resumed["unfinished"])
        set_random_state(resumed["random"])

    def merge_epoch_sums(self) -> None:
        """Called when a batch has been trained on, after a resume inside an epoch."""
        if self.sums:
            merge_epoch_sums(self)

    def state(self) -> dict[str, Any]:
        """Returns the random state and the place in every loader, as tensors and numbers."""
        self.merge_epoch_sums()
        fetched, in_hand = self._final_prefetch or self._prefetched()
        between_epochs = self.epoch.batch_progress.is_last_batch
        ahead = in_hand + max(fetched - in_hand - self.epoch.batch_progress.current.processed, 0)
        validation = combined_loader(self.validation)
        return {
            "random": self.training_random or random_state(),
            "requested_at": self._loader_random,
            "loaders": [
                loader.position(ahead, between_epochs)
                if isinstance(loader, TrackedLoader)
                else None
                for loader in self.tracked_loaders
            ],
            "validation": generator_states([] if validation is None else validation.flattened),
            "unfinished": mid_epoch_state(self),
            "smaller_batches": self.batches.state(),
        }

    def _prefetched(self) -> tuple[int, int]:
        fetcher = data_fetcher(self.fit)
        return (getattr(fetcher, "fetched", 0), len(getattr(fetcher, "batches", ())))

    def _fit_run(self) -> None:
        """Runs the fit; errors of hooks that averaged quantized weights say what they mean."""
        try:
            type(self.fit).run(self.fit)
        except Exception as error:
            explained = engine.explain_hook_error(
                self.fit.trainer.lightning_module, error, HOOK_CALLERS
            )
            if explained is None:
                raise
            raise explained from error

    def _fit_setup_data(self) -> None:
        """Requests the loaders from the random state of the run that is resumed."""
        fit = self.fit
        if combined_loader(fit) is not None and not self.tracked_loaders:
            # From before the fit, as of a setup() that reads estimated_stepping_batches.
            if any(self._prefetched()):
                # Of a loader that may give its first batch only once.
                self.batches.set_up()
            else:
                drop_loaders(fit)
        if combined_loader(fit) is not None and not reloads_training_data(fit):
            return
        resumed = self.resumed
        if resumed is not None and resumed.get("requested_at"):
            set_random_state(resumed["requested_at"])
        before = random_state()
        self._user_loaders = []
        self.batches.give_back()
        try:
            type(fit).setup_data(fit)
        finally:
            combined = combined_loader(fit)
            if combined is not None and self._user_loaders:
                fetcher = data_fetcher(fit)
                if fetcher is not None:
                    # The loop iterates over a copy with tracked loaders; all others see the user's.
                    fetcher.setup(copy.copy(combined))
                    fetcher.iterator = fetcher.combined_loader
                    # Only for the length: the first epoch's workers would live as long as the fit.
                    make = type(combined._iterator)
                    combined._iterator = make(self._user_loaders, combined.limits)
                combined.flattened = self._user_loaders
                self.batches.set_up()
        # Nothing to go back to where nothing was drawn.
        self._loader_random = None if same_state(before, random_state()) else before
        if resumed is not None and self._prefetched()[1]:
            places = resumed["loaders"] if self.mid_epoch else []
            if not any("torch" in place["start"] for place in places if place):
                resumed["random"] = random_state()

    def _fit_load_combined_loader_states(self) -> None:
        """Puts tracked loaders in place, between their setup and the first fetch."""
        fit = self.fit
        combined = combined_loader(fit)
        self._user_loaders = combined.flattened
        states = loader_states(fit)
        if len(states) != sum(map(is_stateful, self._user_loaders)):
            # Of files in which tracked loaders counted as stateful ones without a state.
            states = [state for state in states if state]
        restore_loader_states(fit, states)
        positions: list[Any] = [None] * len(self._user_loaders)
        if self.resumed is not None and len(self.resumed["loaders"]) == len(positions):
            positions = self.resumed["loaders"]
            if not self.mid_epoch:
                positions = [place and next_epoch_position(place) for place in positions]
        self.tracked_loaders = [
            loader if is_stateful(loader) else TrackedLoader(loader, place)
            for loader, place in zip(self._user_loaders, positions, strict=True)
        ]
        combined.flattened = self.tracked_loaders
        if self.resumed is not None:
            # A loader without a length is fetched ahead: of the next epoch, or as it was before.
            set_random_state(self.resumed["random"])

    def _fit_on_advance_end(self) -> None:
        fit = self.fit
        self._failures.monitored_barrier(_EPOCH_END)
        self.merge_epoch_sums()
        self.sums = {}
        if not fit.restarted_on_epoch_end:
            # Else Lightning leaves out a step of the plateau schedulers, for which it has no
            # metrics; they were restored.
            end_restart(fit)
        self.ending_epoch = True
        try:
            type(fit).on_advance_end(fit)
        finally:
            self.ending_epoch = False

    def _epoch_advance(self, fetcher: Any) -> None:
        self._failures.begin_batch()
        try:
            self.batches.advance(fetcher)
        except StopIteration:
            self._failures.begin_batch(-1)
            raise
        if self.epoch.batch_progress.is_last_batch:
            # Before validation, in which the others would wait for this process as well.
            self._failures.monitored_barrier(_EPOCH_END)

    def _epoch_reset(self) -> None:
        """Resets the loop, without the advice to make loaders resumable: they are."""
        epoch = self.epoch
        was_last = epoch.restarted_on_train_batch_end and epoch.batch_progress.is_last_batch
        with warnings.catch_warnings():
            if self.tracked_loaders:
                warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended be")
            type(epoch).reset(epoch)
        if was_last and epoch.trainer.num_training_batches == float("inf"):
            # Lightning begins the next epoch, but would go on counting the batches of the last.
            epoch.batch_progress.reset_on_run()
            epoch.scheduler_progress.reset_on_run()
            epoch.automatic_optimization.optim_progress.reset_on_run()
            epoch.val_loop.batch_progress.total.reset()

    def _validation_run(self) -> Any:
        self._failures.monitored_barrier("validation")
        return self._with_separate_rng("run")

    def _validation_increment_progress_to_evaluation_end(self) -> Any:
        return self._with_separate_rng("increment_progress_to_evaluation_end")

    def _with_separate_rng(self, method: str) -> Any:
        """Validates with random numbers apart from training's.

        Lightning does not run a validation again that came after the checkpoint it resumes from.
        """
        loop, outer = self.validation, self.training_random
        self.training_random = outer or random_state()
        try:
            states, self._validation_generators = self._validation_generators, None
            if states:
                loop.setup_data()
                combined = combined_loader(loop)
                set_generator_states([] if combined is None else combined.flattened, states)
            return getattr(type(loop), method)(loop)
        finally:
            set_random_state(self.training_random)
            self.training_random = outer
