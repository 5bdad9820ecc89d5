"""LoRA+, after Hayou et al. 2024 (arXiv 2402.12354): a higher learning rate for ``B``.

A group of its own for ``B`` would not be known to LR schedulers, which ``configure_optimizers``
made for the groups that there are. So an optimizer has it during the step only: before and after,
its groups, their rates and its checkpoints are the user's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_peft.engine.adapters import (
    adapter_parameters,
)
from lightning_peft.engine.record import adapted_parts
from lightning_peft.engine.training.optimizer_groups import held_ids, steps_by_tensor
from lightning_peft.errors import ConfigError, itemize

_RATE = "lora_plus_lr_ratio"


def scale_b_rates(module: nn.Module, optimizers: Iterable[Any], ratio: float) -> int:
    """Lets ``B`` of linear layers and convolutions step with ``ratio`` times their group's rate.

    Adapters of embeddings keep that rate: an input of theirs is one row of ``A``.

    Returns:
        How many factors ``B`` they hold.
    """
    factors = {
        id(param)
        for _, part in adapted_parts(module)
        for name, param in adapter_parameters(part).items()
        if "lora_B" in name.split(".")
    }
    held: dict[Any, set[int]] = {one: factors & held_ids([one]) for one in optimizers}
    problems = [
        f"{type(one).__name__} may keep more than a state for each tensor. Make groups with their "
        "rates in configure_optimizers, and leave the argument out"
        for one, found in held.items()
        if found and not steps_by_tensor(one)
    ]
    if not any(held.values()):
        problems.append("no optimizer holds a factor B, which LoRA and AdaLoRA have")
    if problems:
        raise ConfigError(f"{_RATE}={ratio:g} cannot be followed:" + itemize(problems))
    for one, found in held.items():
        if found:
            _SplitStep(one, found, ratio)
    return sum(map(len, held.values()))


class _SplitStep:
    """Hooks of one optimizer: its groups are split when gradients are there, and whole again."""

    def __init__(self, optimizer: Any, factors: set[int], ratio: float) -> None:
        previous = optimizer.__dict__.pop(_RATE, None)
        if previous is not None:
            # Of an earlier fit with the same optimizer.
            previous.remove()
        self._factors, self._ratio = factors, ratio
        self._whole: list[dict[str, Any]] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        optimizer.__dict__[_RATE] = self

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        self._after(optimizer)
        given = [*args[1:], *kwargs.values()]
        closure = next((one for one in given if callable(one)), None)
        if closure is None:
            self._split(optimizer)
            return None

        # Which computes the gradients, and may look at the groups, or change their rates.
        def then_split() -> Any:
            loss = closure()
            self._split(optimizer)
            return loss

        return (
            tuple(then_split if one is closure else one for one in args),
            {key: then_split if one is closure else one for key, one in kwargs.items()},
        )

    def _split(self, optimizer: Any) -> None:
        self._whole = optimizer.param_groups
        optimizer.param_groups = [part for group in self._whole for part in self._parts(group)]

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        fast = [param for param in group["params"] if id(param) in self._factors]
        if not fast:
            return [group]
        rest = [param for param in group["params"] if id(param) not in self._factors]
        return [
            {**group, "params": rest},
            {**group, "params": fast, "lr": group["lr"] * self._ratio},
        ]

    def _after(self, optimizer: Any, *given: Any) -> None:
        if self._whole is not None:
            optimizer.param_groups, self._whole = self._whole, None
