"""Detection of weights that are never saved: NaN, infinite, or others in each process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft import engine
from lightning_peft.compat.lightning import averages_models
from lightning_peft.errors import DivergenceError, itemize


def broken_tensors(module: nn.Module) -> list[str]:
    """Returns the names of trainable parameters with values that are NaN or infinite."""
    values = {
        n: p.detach() for n, p in module.named_parameters() if p.requires_grad and not is_lazy(p)
    }
    values = {n: value for n, value in values.items() if not value.is_meta}
    if not values:
        return []
    device = next(iter(values.values())).device
    # One wait for the device, not one for each.
    whole = torch.stack([torch.isfinite(value).all().to(device) for value in values.values()])
    return [name for name, sound in zip(values, whole.tolist(), strict=True) if not sound]


class DivergenceCheck:
    """Ends a fit whose weights are spoilt, so that its checkpoints stay from before.

    It looks at weights, not at losses: a loss may be NaN in a step that a GradScaler skips, and
    weights may be spoilt while the loss is finite.
    """

    def __init__(self) -> None:
        self._known: frozenset[str] = frozenset()
        self._step = 0

    def start(self, trainer: Any) -> None:
        """Remembers what is like that before training, where a module has a use for it."""
        self._known = frozenset(broken_tensors(trainer.lightning_module))
        self._step = trainer.global_step

    def at_batch(self, trainer: Any) -> None:
        """Looks as often as a run logs, where the loss is waited for as well."""
        step = trainer.global_step
        if step != self._step and step % max(1, trainer.log_every_n_steps) == 0:
            self._step = step
            self.check(trainer)

    def check(self, trainer: Any) -> None:
        """Looks at the weights."""
        broken = [n for n in broken_tensors(trainer.lightning_module) if n not in self._known]
        if broken:
            raise DivergenceError(
                f"After step {trainer.global_step}, {len(broken)} of the tensors that train hold "
                f"NaN or infinite values, first of all {broken[0]}. They were not saved: the "
                "checkpoints there are have the last good state. Continue from one of them with a "
                "lower learning rate, more warm-up or gradient_clip_val=1.0, with bf16-mixed "
                "instead of 16-mixed precision, and look for rows without a trained token."
            )


def check_processes(strategy: Any) -> None:
    """Compares what trains between processes, which were the same after the first step.

    Raises:
        DivergenceError: In all processes, if they have come apart.
    """
    compared = strategy.lifecycle.checks.compared_processes
    if not compared or strategy.world_size == 1 or averages_models(strategy):
        return
    mine = engine.checksums_of_trained(strategy.lightning_module)
    problems = engine.differing_problems("adapters", engine.gathered(mine, strategy.world_size))
    if problems:
        raise DivergenceError(
            f"After step {strategy.lightning_module.trainer.global_step} the processes no longer "
            "train one model:"
            + itemize(problems, 8)
            + "\nThey were not saved. After the first step they were the same, so look for what "
            "depends on the process since: a schedule by a metric (ReduceLROnPlateau; log it with "
            "sync_dist=True), other learning rates, or a hook that changes gradients or weights. "
            "If a hook does so on purpose, pass verify='off'."
        )
