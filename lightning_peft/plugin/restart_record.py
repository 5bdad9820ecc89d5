"""Smaller batches for processes that torchrun starts again, where one was out of memory.

With a sharded base a process without memory cannot tell the others, which wait for its part of a
block. It writes down by what batches are divided and ends; torchrun ends the others and starts all.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_peft.compat.lightning import combined_loader
from lightning_peft.engine.files.adapter_files import write_file
from lightning_peft.errors import LifecycleError
from lightning_peft.plugin.checkpoint_content import CHECKPOINT_KEY
from lightning_peft.plugin.launch import is_last_restart, is_restarted


class RestartRecord:
    """The file by which processes that are started again know how small their batches are."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self._accumulate = trainer, trainer.accumulate_grad_batches
        self._file = Path(trainer.default_root_dir) / "smaller_batches.json"

    @cached_property
    def _divisions(self) -> dict[str, int]:
        """By what batches are divided, for each fit in the folder; empty at a first start."""
        divisions: dict[str, int] = {}
        if self.trainer.is_global_zero and not is_restarted():
            # Of an earlier job.
            self._file.unlink(missing_ok=True)
        elif self.trainer.is_global_zero and self._file.is_file():
            divisions = json.loads(self._file.read_text(encoding="utf-8"))
        return dict(self.trainer.strategy.broadcast(divisions))

    def division(self, batch_size: int | None) -> int:
        """By what batches of ``batch_size`` rows are divided from the start."""
        return self._divisions.get(self._key(batch_size), 1)

    def _key(self, batch_size: int | None) -> str:
        return f"{batch_size}x{self._accumulate}"

    def divide(self, checkpoint: Any) -> None:
        """Counts what a checkpoint says of batches in the smaller ones."""
        everyone = checkpoint.get(CHECKPOINT_KEY, {}).get("processes")
        if not everyone or not self._divisions:
            return
        division, before = self._known_division(), division_in(everyone[0], self._accumulate)
        if division <= before:
            # A later checkpoint has them already.
            return
        factor = division // before
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            # At the end of a batch, of which Lightning counts the last as not completed, as here.
            more = counts["processed"] * (factor - 1)
            counts.update({name: count + more for name, count in counts.items()})
        for one in everyone:
            for place in filter(None, one["loaders"]):
                place["yielded"] *= factor
            accumulate = self._accumulate * division
            one["smaller_batches"] = {"division": division, "accumulate": accumulate}

    def _known_division(self) -> int:
        # As a setup() does that reads estimated_stepping_batches; the fit asks again.
        self.trainer.fit_loop.setup_data()
        combined = combined_loader(self.trainer.fit_loop)
        loaders = [] if combined is None else combined.flattened
        return self.division(getattr(loaders[0], "batch_size", None)) if loaders else 1

    def end(self, batch_size: int, division: int, reason: str) -> LifecycleError:
        """Writes down the division; returns the error with which this process ends."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        content = {**self._divisions, self._key(batch_size): division}
        write_file(self._file, json.dumps(content).encode())
        if is_last_restart():
            outcome = (
                "This was the last of torchrun's --max-restarts. Submit the run again with "
                f"batch_size={batch_size // division} and "
                f"accumulate_grad_batches={self._accumulate * division}, the same rows in a step"
            )
        else:
            outcome = (
                "torchrun starts all processes again, with batches that are "
                f"{division} times smaller, and as many more for an optimizer step: the same rows"
            )
        return LifecycleError(
            f"Out of memory after optimizer step {self.trainer.global_step} ({reason}). {outcome}. "
            "A recipe with --run_dir continues from the newest checkpoint, a script from the "
            "ckpt_path that it gives to fit."
        )


def division_in(state: dict[str, Any] | None, accumulate: int) -> int:
    """By what batches are divided in a process's entry of a checkpoint.

    1 where the user has given the smaller batches since, of which ``accumulate`` are a step.
    """
    saved = (state or {}).get("smaller_batches")
    if not saved or accumulate * saved["division"] != saved["accumulate"]:
        return 1
    return int(saved["division"])
