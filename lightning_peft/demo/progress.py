"""Progress line for output that is not a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from lightning_peft.plugin.namespace import LateBoundMeta

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as _Base
else:
    _Base = object


class ProgressLines(_Base, metaclass=LateBoundMeta):
    """Prints a line at every tenth of the run."""

    lightning_base = "callbacks.Callback"

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.started = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Prints step, loss and the time left, ten times."""
        step = trainer.global_step
        if step and step % max(1, self.steps // 10) == 0:
            spent = time.perf_counter() - self.started
            left = spent / step * (self.steps - step)
            loss = float(trainer.callback_metrics["train_loss"])
            print(
                f"  step {step}/{self.steps}  loss {loss:.3f}  {spent:.0f} s, {left:.0f} s left",
                flush=True,
            )


def progress_callback(lightning: Any, steps: int) -> Any:
    """Returns Lightning's rich bar on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        return lightning.callbacks.RichProgressBar(leave=True)
    return ProgressLines(steps)
