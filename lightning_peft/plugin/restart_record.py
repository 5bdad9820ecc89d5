"""Smaller batches for processes that torchrun starts again, where one was out of memory.

With a sharded base a process without memory cannot tell the others, which wait for its part of a
block. It writes down by what batches are divided and ends; torchrun ends the others and starts all.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_peft.engine.files.adapter_files import write_file
from lightning_peft.errors import LifecycleError
from lightning_peft.plugin.checkpoint_content import CHECKPOINT_KEY
from lightning_peft.plugin.launch import is_restarted


class RestartRecord:
    """The file by which processes that are started again know how small their batches are."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self._accumulate = trainer, trainer.accumulate_grad_batches
        self._file = Path(trainer.default_root_dir) / "smaller_batches.json"

    @cached_property
    def division(self) -> int:
        """By what batches are divided from the start; 1 where torchrun started nothing again."""
        division = 1
        if self.trainer.is_global_zero and not is_restarted():
            # Of an earlier job.
            self._file.unlink(missing_ok=True)
        elif self.trainer.is_global_zero and self._file.is_file():
            division = json.loads(self._file.read_text(encoding="utf-8"))["division"]
        return int(self.trainer.strategy.broadcast(division))

    def divide(self, checkpoint: Any) -> None:
        """Counts what a checkpoint says of batches in the smaller ones."""
        everyone = checkpoint.get(CHECKPOINT_KEY, {}).get("processes")
        if not everyone or self.division == 1:
            return
        before = (everyone[0].get("smaller_batches") or {}).get("division", 1)
        # A later checkpoint has them already.
        factor = max(1, self.division // before)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            counts.update({name: count * factor for name, count in counts.items()})
        for one in everyone:
            for place in filter(None, one["loaders"]):
                place["yielded"] *= factor
            division = before * factor
            accumulate = self._accumulate * division
            one["smaller_batches"] = {"division": division, "accumulate": accumulate}

    def end(self, division: int, reason: str) -> LifecycleError:
        """Writes down the division; returns the error with which this process ends."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._file, json.dumps({"division": division}).encode())
        return LifecycleError(
            f"Out of memory after optimizer step {self.trainer.global_step} ({reason}). torchrun "
            "starts all processes again, from the newest checkpoint, with batches that are "
            f"{division} times smaller, and as many more for an optimizer step: the same rows."
        )
