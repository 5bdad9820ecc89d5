"""Ctrl-C: finish the step and save; a second time, stop at once."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.plugin.namespace import PerNamespace

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as _Base
else:
    _Base = object


class SaveOnInterrupt(_Base, metaclass=PerNamespace):
    """On the first interrupt, ends a fit after the optimizer step that is running, and saves.

    A second interrupt is an ordinary ``KeyboardInterrupt``. Outside of a fit, and in threads,
    nothing is changed.

    Attributes:
        saved: The checkpoint that was written, once there is one.
    """

    lightning_base = "callbacks.Callback"

    def __init__(self) -> None:
        self.saved: Path | None = None
        self._asked = False
        self._handler: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listens from here on."""
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, number: int, frame: Any) -> None:
        if self._asked:
            self._stop_listening()
            raise KeyboardInterrupt
        self._asked = True
        print(
            "\nStopping when this step is done, and saving. Press Ctrl-C again to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves and ends the fit, if asked to and no gradients are being accumulated."""
        if not self._asked or trainer.fit_loop._should_accumulate():
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        path = folder / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        self.saved = path
        trainer.should_stop = True
        # Lightning would finish the least number of epochs, and validate, first.
        trainer.fit_loop.epoch_loop.min_steps = None
        trainer.fit_loop.min_epochs = 0
        trainer.limit_val_batches = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Listens no more."""
        self._stop_listening()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Listens no more."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None
