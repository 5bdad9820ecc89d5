"""Settings and available memory of a started run, for the planner."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from lightning_peft import engine
from lightning_peft.plan.device_memory import DeviceMemory, available_memory
from lightning_peft.plan.margins import PROCESS_BYTES
from lightning_peft.plan.settings import PRECISIONS, PlanSettings


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


def memory_of(trainer: Any, module: Any) -> DeviceMemory:
    """Returns the memory that a process of the run can have: free, and already in use by it.

    Processes on the CPU of one machine share what is free.
    """
    used = _held(module)
    if module.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(module.device)
        return DeviceMemory(torch.cuda.get_device_name(module.device), free + used, "cuda", used)
    sharing = max(1, trainer.world_size // max(1, trainer.num_nodes))
    free = available_memory() // sharing
    return DeviceMemory("this machine's memory", free + used, "cpu", used)


def _held(module: Any) -> int:
    if module.device.type == "cuda":
        return torch.cuda.memory_reserved(module.device) + PROCESS_BYTES["cuda"][1]
    return int(psutil.Process().memory_info().rss)


def whole_memory(module: Any) -> int:
    """Returns the bytes of the device of a run, whoever uses them."""
    if module.device.type == "cuda":
        return int(torch.cuda.get_device_properties(module.device).total_memory)
    return int(psutil.virtual_memory().total)
