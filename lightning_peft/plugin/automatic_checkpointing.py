"""``gradient_checkpointing="auto"``: decided at the first batch, and again where one is larger."""

from __future__ import annotations

import math
from typing import Any

from lightning_peft import engine
from lightning_peft.plan.activation_decision import (
    ActivationDecision,
    decide_activations,
    elements_of,
)
from lightning_peft.plan.sources import rows_of
from lightning_peft.plugin.optimization import log_info
from lightning_peft.plugin.run_memory import memory_of, settings_of, whole_memory, without_values

NAME = "gradient_checkpointing"
_RESUMED = "as when the run began"


class AutomaticCheckpointing:
    """Lets blocks keep everything as long as that fits, else their inputs only.

    Both give the same numbers, bit for bit, so the answer may change within a run: it does where a
    batch is so much larger than the one decided for that it may not fit.

    Args:
        strategy: The strategy, whose module has blocks to checkpoint.

    Attributes:
        decision: The latest decision, once there is a batch.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self.decision: ActivationDecision | None = None
        # Elements of a batch for which the decision holds.
        self._largest = 0.0

    def before_batch(self, batch: Any) -> ActivationDecision:
        """Decides with the first batch, and again where a batch needs it."""
        if self.decision is None:
            self._start(batch)
        elif not self.decision.recompute and elements_of(batch) > self._largest:
            self._apply(self._decide(batch), batch)
        assert self.decision is not None
        return self.decision

    def _start(self, batch: Any) -> None:
        strategy = self._strategy
        module = strategy.lightning_module
        # Only the first process has the record of a run.
        known = strategy.broadcast(strategy.lifecycle.decided.get(NAME))
        if known is not None and known["device_bytes"] <= whole_memory(module):
            self._largest = known["up_to_elements"]
            self.decision = ActivationDecision(known["value"], _RESUMED)
            self._switch()
            return
        decision = self._decide(batch)
        if strategy.world_size > 1:
            fits = strategy.reduce_boolean_decision(not decision.recompute, all=True)
            if not fits and not decision.recompute:
                decision = ActivationDecision(True, "it does not fit on another process")
        self._apply(decision, batch)

    def _decide(self, batch: Any) -> ActivationDecision:
        module = self._strategy.lightning_module
        trainer = module.trainer
        shapes = without_values(batch)
        settings = settings_of(trainer, module, rows_of(shapes))
        return decide_activations(module, shapes, settings, memory_of(trainer, module))

    def _apply(self, decision: ActivationDecision, batch: Any) -> None:
        self.decision = decision
        # Attention may grow with the square of the length.
        self._largest = elements_of(batch) * math.sqrt(max(1.0, decision.room))
        self._strategy.lifecycle.decided[NAME] = {
            "value": decision.recompute,
            "reason": decision.reason,
            "up_to_elements": int(self._largest),
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
