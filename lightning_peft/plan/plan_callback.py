"""A callback that says before the first step that a run will not fit, and afterwards why not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import psutil
import torch

from lightning_peft import engine
from lightning_peft.compat.torch import tree_map
from lightning_peft.plan.device_memory import DeviceMemory
from lightning_peft.plan.explanation import memory_warning, out_of_memory_message
from lightning_peft.plan.margins import PROCESS_BYTES
from lightning_peft.plan.prediction import Prediction, predict
from lightning_peft.plan.settings import PRECISIONS, PlanSettings
from lightning_peft.plan.sources import ModelSource, from_module, rows_of
from lightning_peft.plan.suggestions import suggest_changes
from lightning_peft.plugin.namespace import LateBoundMeta

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as _Base
else:
    _Base = object

log = logging.getLogger(__name__)


class MemoryPlanCallback(_Base, metaclass=LateBoundMeta):
    """Plans the run on its first batch, warns where it does not fit, and explains an end by memory.

    The first batch is not the largest, so a run can still end where nothing was said at first. A
    module that cannot be planned for is left alone: a plan never stops a run.
    """

    lightning_base = "callbacks.Callback"

    def __init__(self) -> None:
        super().__init__()
        self._latest: Any = None
        self._begun = False

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the shapes of the batch; plans with the first."""
        self._latest = tree_map(_shape, batch)
        if self._begun:
            return
        self._begun = True
        if not trainer.is_global_zero:
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
    """Says whether a device or the machine had no memory left."""
    if isinstance(exception, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(exception, RuntimeError) and any(
        word in str(exception).lower() for word in words
    )


def _shape(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value


def _planned(
    trainer: Any, module: Any, batch: Any
) -> tuple[ModelSource, Prediction, DeviceMemory] | None:
    try:
        source = from_module(module, batch)
        settings = settings_of(trainer, module, rows_of(batch))
        return source, predict(source, settings), _device_of(module)
    except Exception as error:
        # Whatever it is, it is a fault of the plan and not of the run.
        log.info("The memory of this run cannot be planned: %s", error)
        return None


def _changes(source: ModelSource, plan: Prediction, device: DeviceMemory) -> list[Any]:
    return suggest_changes(source, plan, device.bytes)


def settings_of(trainer: Any, module: Any, rows: int | None) -> PlanSettings:
    """Returns the settings of a run that has started.

    An optimizer that the planner does not know counts as torch's AdamW.
    """
    record = engine.record_of(module)
    quantized = record is not None and any(p.quantized for p in record.parts.values())
    precision = str(trainer.precision)
    return PlanSettings(
        method="full" if record is None else "qlora" if quantized else "lora",
        batch_size=rows or 1,
        accumulate=trainer.accumulate_grad_batches,
        precision=precision if precision in PRECISIONS else "32-true",
        optimizer=_name_of(trainer.optimizers),
        gradient_checkpointing=engine.is_checkpointed(module),
        device="cuda" if module.device.type == "cuda" else "cpu",
    )


def _name_of(optimizers: list[Any]) -> str:
    names = engine.optimizer_names(optimizers)
    if any(group.get("fused") for one in optimizers for group in one.param_groups):
        return "adamw_fused"
    return next((engine.name_of_optimizer(name) for name in names), None) or "adamw_torch"


def _device_of(module: Any) -> DeviceMemory:
    """Returns the memory available to the run: free, and already in use by it."""
    if module.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(module.device)
        used = torch.cuda.memory_reserved(module.device) + PROCESS_BYTES["cuda"][1]
        return DeviceMemory(torch.cuda.get_device_name(module.device), free + used, "cuda")
    used = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    return DeviceMemory("this machine's memory", free + used, "cpu")
