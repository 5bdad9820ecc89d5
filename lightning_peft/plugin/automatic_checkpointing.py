"""``gradient_checkpointing="auto"``, decided on the first and any larger batch."""

from __future__ import annotations

import math
from typing import Any

from lightning_peft import engine
from lightning_peft.plan.activation_decision import ActivationDecision, decide_activations
from lightning_peft.plan.batch_size import BatchSize, size_of, without_values
from lightning_peft.plan.sources import rows_of
from lightning_peft.plugin.optimization import log_info
from lightning_peft.plugin.run_memory import memory_of, settings_of, whole_memory

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
