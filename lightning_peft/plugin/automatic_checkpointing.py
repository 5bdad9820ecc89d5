"""``gradient_checkpointing="auto"``, decided on the first and any larger batch."""

from __future__ import annotations

import math
from typing import Any

import psutil
import torch

from lightning_peft import engine
from lightning_peft.plan.activation_decision import ActivationDecision, decide_activations
from lightning_peft.plan.batch_size import BatchSize, size_of, without_values
from lightning_peft.plan.device_memory import DeviceMemory, available_memory
from lightning_peft.plan.margins import PROCESS_BYTES
from lightning_peft.plan.settings import PRECISIONS, PlanSettings
from lightning_peft.plan.sources import rows_of
from lightning_peft.plugin.optimization import log_info

NAME = "gradient_checkpointing"
_RESUMED = "as when the run began"


class AutomaticCheckpointing:
    """Lets blocks keep everything as long as that fits, else their inputs only.

    Both give the same numbers, bit for bit, so the answer may change within a run: it does where a
    batch is so much larger than the one decided for that it may not fit.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self.decision: ActivationDecision | None = None
        # Sizes up to which activations are kept, one entry for each decision. A batch that is
        # within one of them is not decided for again.
        self._up_to: list[dict[str, int]] = []

    def before_batch(self, batch: Any) -> ActivationDecision:
        """Decides with the first batch, and again where a batch needs it."""
        if self.decision is None or not self.decision.recompute:
            size = size_of(self._strategy.lightning_module, batch)
            if self.decision is None:
                self._start(batch, size)
            elif not self._is_known(size):
                self._apply(self._decide(batch), size)
        assert self.decision is not None
        return self.decision

    def _is_known(self, size: BatchSize) -> bool:
        return not size.unknown and any(size.is_within(bounds) for bounds in self._up_to)

    def _start(self, batch: Any, size: BatchSize) -> None:
        strategy = self._strategy
        # Only the first process has the record of a run.
        known = strategy.broadcast(strategy.lifecycle.decided.get(NAME))
        if known is not None and self._all_take(known, size):
            self.decision = ActivationDecision(known["value"], _RESUMED)
            self._switch()
            return
        self._up_to = []
        decision = self._decide(batch)
        fits = self._on_all(not decision.recompute)
        if not fits and not decision.recompute:
            decision = ActivationDecision(True, "it does not fit on another process")
        self._apply(decision, size)

    def _all_take(self, known: dict[str, Any], size: BatchSize) -> bool:
        """Whether what the run decided when it began holds in all processes."""
        module = self._strategy.lightning_module
        self._up_to = list(known.get("up_to", ()))
        holds = known["value"] or self._is_known(size)
        return self._on_all(holds and known["device_bytes"] <= whole_memory(module))

    def _on_all(self, answer: bool) -> bool:
        strategy = self._strategy
        if strategy.world_size == 1:
            return answer
        return bool(strategy.reduce_boolean_decision(answer, all=True))

    def _decide(self, batch: Any) -> ActivationDecision:
        module = self._strategy.lightning_module
        trainer = module.trainer
        shapes = without_values(batch)
        settings = settings_of(trainer, module, rows_of(shapes))
        return decide_activations(module, shapes, settings, memory_of(trainer, module))

    def _apply(self, decision: ActivationDecision, size: BatchSize) -> None:
        self.decision = decision
        # Attention may grow with the square of the length.
        self._up_to.append(size.bounds(math.sqrt(max(1.0, decision.room))))
        self._strategy.lifecycle.decided[NAME] = {
            "value": decision.recompute,
            "reason": decision.reason,
            "up_to": self._up_to,
            "device_bytes": whole_memory(self._strategy.lightning_module),
        }
        self._switch()

    def _switch(self) -> None:
        strategy, decision = self._strategy, self.decision
        assert decision is not None
        where = ""
        if decision.recompute:
            strategy._checkpointing.disable()
            strategy._checkpointing = engine.checkpoint_activations(
                strategy.lightning_module, "auto"
            )
            where = f" ({'; '.join(strategy._checkpointing.descriptions)})"
        log_info(
            strategy,
            f"{NAME}='auto': {'on' if decision.recompute else 'off'}{where}: {decision.reason}. "
            f"{NAME}={not decision.recompute} switches it {'off' if decision.recompute else 'on'}.",
        )


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
