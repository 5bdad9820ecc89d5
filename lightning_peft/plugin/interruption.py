"""Interruption by Ctrl-C or a stop request: save after the step; a second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning_peft.compat.lightning import is_accumulating, quiet_exit
from lightning_peft.plugin.namespace import LateBoundCallback, namespace_of


class SaveOnInterrupt(LateBoundCallback):
    """On the first interrupt, ends a fit after the optimizer step that is running, and saves.

    One that comes while the fit validates ends it there, in a single process. A second interrupt of
    the same kind is an ordinary ``KeyboardInterrupt``: of Ctrl-C, schedulers and launchers pass on
    another one. Outside of a fit, and in threads, nothing is changed.
    """

    def __init__(self) -> None:
        self.saved: Path | None = None
        self._stop = self._save = False
        self._first_signal: int | None = None
        self._limit_val_batches: Any = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listens from here on."""
        self.listen()

    def listen(self) -> None:
        """Listens from here on; does nothing where it does already."""
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._handle_signal)

    def request(self, stop: bool = False, save: bool = False) -> None:
        """Requests the same from the program itself, from a thread too; ``save`` ends nothing."""
        self._stop, self._save = self._stop or stop, self._save or save

    def _handle_signal(self, number: int, frame: Any) -> None:
        if self._stop and self._first_signal in (None, number):
            self._restore_handlers()
            raise KeyboardInterrupt
        if self._stop:
            return
        self._stop, self._first_signal = True, number
        print(
            "\nStopping when this step is done, and saving. Press Ctrl-C again to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and ends the fit, if asked to and no gradients are being accumulated."""
        if is_accumulating(trainer.fit_loop):
            return
        # One process may have been asked, and saving takes all of them.
        stop, save = self._any_rank(trainer, self._stop), self._any_rank(trainer, self._save)
        if save and not stop:
            self._save = False
            trainer.save_checkpoint(_checkpoint_folder(trainer) / "saved.ckpt")
        if not stop or self.saved is not None:
            return
        self._save_interrupted(trainer)
        trainer.should_stop = True
        # Lightning would finish the least number of epochs, and validate, first.
        trainer.fit_loop.epoch_loop.min_steps = None
        trainer.fit_loop.min_epochs = 0
        self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def is_stopping(self, trainer: Any) -> bool:
        """Whether the fit ends with this step; of several processes, once they have agreed."""
        return self.saved is not None or (self._stop and trainer.world_size == 1)

    def _save_interrupted(self, trainer: Any) -> None:
        path = _checkpoint_folder(trainer) / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        self.saved = path

    def on_validation_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ends the fit between two steps, if asked to."""
        self.on_validation_part(trainer)

    def on_validation_part(self, trainer: Any, **part: Any) -> None:
        """Ends the fit in the middle of a validation or of its samples, if asked to.

        What was validated of the rows is dropped, so that no metric of a part of them is logged.
        With several processes, which would have to agree at each batch, the validation is finished.
        """
        # Samples of the base come inside a step, which callbacks after this one have to see.
        between = trainer.state.fn == "fit" and trainer.validating
        if not (between and self.is_stopping(trainer)) or self.saved is not None:
            return
        epoch_loop = trainer.fit_loop.epoch_loop
        if is_accumulating(epoch_loop):
            return
        # Or who resumes would validate the other rows alone.
        epoch_loop.val_loop.batch_progress.reset()
        self._save_interrupted(trainer)
        self._restore_handlers()
        # Lightning ends a fit in this way where a learning rate was looked for.
        raise quiet_exit(namespace_of(self) or "")

    def _any_rank(self, trainer: Any, requested: bool) -> bool:
        if trainer.world_size == 1:
            return requested
        return bool(trainer.strategy.reduce_boolean_decision(requested, all=False))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Listens no more."""
        if self._limit_val_batches is not None:
            # Or a validation after the fit would fail.
            trainer.limit_val_batches = self._limit_val_batches
            self._limit_val_batches = None
        self._restore_handlers()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Listens no more."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def _checkpoint_folder(trainer: Any) -> Path:
    checkpoints = trainer.checkpoint_callback
    if checkpoints is not None and checkpoints.dirpath:
        return Path(checkpoints.dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
