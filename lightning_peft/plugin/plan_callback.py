"""Callback that predicts and explains out-of-memory errors."""

from __future__ import annotations

import logging
from typing import Any

import torch

from lightning_peft.plan.activation_decision import surely_fits
from lightning_peft.plan.batch_size import size_of, without_values
from lightning_peft.plan.device_memory import DeviceMemory
from lightning_peft.plan.prediction import Prediction, predict
from lightning_peft.plan.sources import ModelSource, from_module, rows_of
from lightning_peft.plan.suggestions import memory_warning, out_of_memory_message, suggest_changes
from lightning_peft.plugin.adapter_strategy import AdapterStrategy
from lightning_peft.plugin.automatic_checkpointing import memory_of, settings_of
from lightning_peft.plugin.namespace import LateBoundCallback

log = logging.getLogger(__name__)


class MemoryPlanCallback(LateBoundCallback):
    """Plans the run on its first batch, warns where it does not fit, and explains an end by memory.

    The first batch is not the largest, so a run can still end where nothing was said at first. A
    module that cannot be planned for is left alone: a plan never stops a run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latest: Any = None
        self._begun = False

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the shapes of the batch; plans with the first."""
        self._latest = without_values(batch)
        if self._begun:
            return
        self._begun = True
        strategy = trainer.strategy
        if isinstance(strategy, AdapterStrategy):
            # On all processes, which decide together.
            decision = strategy.decide_checkpointing(batch)
            if decision is not None and decision.planned and not decision.recompute:
                return
        if not trainer.is_global_zero:
            return
        size = size_of(pl_module, self._latest)
        if surely_fits(pl_module, size, memory_of(trainer, pl_module)):
            return
        planned = _planned(trainer, pl_module, self._latest)
        if planned is None:
            return
        source, plan, device = planned
        if not plan.fits(device.bytes):
            log.warning(memory_warning(plan, device, _changes(source, plan, device)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lets go of the batch."""
        self._latest, self._begun = None, False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Says what used the memory, if that was the reason."""
        latest, self._latest, self._begun = self._latest, None, False
        if latest is None or not is_out_of_memory(exception):
            return
        planned = _planned(trainer, pl_module, latest)
        if planned is not None:
            source, plan, device = planned
            log.error(out_of_memory_message(plan, device, _changes(source, plan, device)))


def is_out_of_memory(exception: BaseException) -> bool:
    """Returns whether a device or the machine had no memory left."""
    if isinstance(exception, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(exception, RuntimeError) and any(
        word in str(exception).lower() for word in words
    )


def _planned(
    trainer: Any, module: Any, batch: Any
) -> tuple[ModelSource, Prediction, DeviceMemory] | None:
    try:
        source = from_module(module, batch)
        settings = settings_of(trainer, module, rows_of(batch))
        return source, predict(source, settings), memory_of(trainer, module)
    except Exception as error:
        # Whatever it is, it is a fault of the plan and not of the run.
        log.info("The memory of this run cannot be planned: %s", error)
        return None


def _changes(source: ModelSource, plan: Prediction, device: DeviceMemory) -> list[Any]:
    return suggest_changes(source, plan, device.bytes)
