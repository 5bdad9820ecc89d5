"""Checks across processes at the start and after the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft import engine
from lightning_peft.compat.lightning import averages_models
from lightning_peft.errors import LifecycleError, itemize


class ProcessChecks:
    """Ends all processes with the same error where one of them finds something wrong.

    What is compared is exchanged between batches, which all processes begin equally often: steps of
    optimizers may depend on the process where a module takes them itself.

    Raises:
        LifecycleError: In all processes, with what any of them found.
    """

    def __init__(
        self, strategy: Any, restored: engine.RestoredState, structural: list[str]
    ) -> None:
        self._strategy = strategy
        module = strategy.lightning_module
        mine = structural + engine.own_problems(module, strategy.optimizers, restored)
        facts = {"problems": mine, "trained": engine.checksums_of_trained(module)}
        everyone = engine.gathered(facts, strategy.world_size)
        problems = _problems_of_each(everyone)
        problems += engine.differing_problems("adapters", [one["trained"] for one in everyone])
        if problems:
            raise LifecycleError(
                "The processes cannot train together as they are:" + itemize(problems, 8) + _OFF
            )
        self._bits = engine.GatheredBits(module)
        self._postponed = False

    def after_batch(
        self, gradients: Mapping[str, str], infinite: list[str], due: bool, last: bool
    ) -> bool:
        """Compares once all processes have taken a step; returns whether that is done."""
        module = self._strategy.lightning_module
        stepped, unreached = bool(gradients) or not due, "none" in gradients.values()
        everyone = engine.gathered((stepped, unreached), self._strategy.world_size)
        if not all(stepped for stepped, _ in everyone):
            return False
        if any(unreached for _, unreached in everyone) and not (self._postponed or last):
            # In its next pass DDP says what it needs for that, before anything differs for long.
            self._postponed = True
            return False
        problems = engine.gradient_problems(module, gradients, infinite)
        if self._bits.changed:
            names = ", ".join(self._bits.changed[:5])
            problems.append(f"gathering changed bits of the frozen base: {names}")
        facts = {
            "problems": problems,
            "gathered": self._bits.sums,
            "gradients": gradients,
            "trained": engine.checksums_of_trained(module),
        }
        self.stop()
        everyone = engine.gathered(facts, self._strategy.world_size)
        problems = _problems_of_each(everyone)
        compared = {"gathered": "bits of the base", "gradients": "layers with gradients"}
        if not averages_models(self._strategy):
            compared["trained"] = "adapters after a step"
        for key, what in compared.items():
            problems += engine.differing_problems(what, [one[key] for one in everyone])
        if problems:
            raise LifecycleError(
                "After the first step the processes do not train together:"
                + itemize(problems, 8)
                + _OFF
            )
        return True

    def stop(self) -> None:
        """Takes away all hooks."""
        self._bits.stop()


_OFF = (
    "\nWhat they train would not be what one process trains. If a hook of the module does this on "
    "purpose, pass verify='off'."
)


def _problems_of_each(everyone: list[Any]) -> list[str]:
    ranks: dict[str, list[int]] = {}
    for rank, one in enumerate(everyone):
        for problem in one["problems"]:
            ranks.setdefault(problem, []).append(rank)
    return [
        f"process{'es' if len(some) > 1 else ''} {', '.join(map(str, some))}: {problem}"
        for problem, some in ranks.items()
    ]
