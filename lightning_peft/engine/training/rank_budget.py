"""Rank allocation of AdaLoRA, computed by PEFT.

PEFT decides after each optimizer step, by ``AdaLoraModel.update_and_allocate``, and adds a penalty
to the loss in the forward pass of its model class. Here is no such model: the strategy calls both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraModel
from peft.tuners.adalora import RankAllocator
from torch import Tensor, nn

from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.configuration import config_from_dict
from lightning_peft.engine.methods.adalora import ADALORA
from lightning_peft.engine.record import require_record
from lightning_peft.errors import ConfigError

# A resumed run keeps its length.
_SCHEDULE = ("total_step", "rank_pattern")
_IMPORTANCE = ("exp_avg_ipt", "exp_avg_unc")
_UPDATE: Any = AdaLoraModel.update_and_allocate
_PENALTY: Any = AdaLoraModel.forward


class RankBudget:
    """Moves ranks between the layers of one AdaLoRA adapter."""

    def __init__(self, named: dict[str, nn.Parameter], config: Any, adapter_name: str) -> None:
        self.step = 0
        self._named, self._config = named, config
        model: Any = SimpleNamespace(named_parameters=self._parameters)
        # What two methods of PEFT's model class read of it.
        self._peft: Any = SimpleNamespace(
            peft_config={adapter_name: config},
            trainable_adapter_name=adapter_name,
            rankallocator=RankAllocator(model, config, adapter_name),
            model=model,
        )
        model.forward = self._zero_loss

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named.items()

    def _zero_loss(self) -> Any:
        device = next(iter(self._named.values())).device
        return SimpleNamespace(loss=torch.zeros((), device=device))

    def penalty(self) -> Tensor:
        """Returns PEFT's penalty on the loss, so that ``A`` and ``B`` stay orthogonal: a scalar."""
        loss: Tensor = _PENALTY(self._peft).loss
        return loss

    @property
    def has_penalty(self) -> bool:
        """Whether :meth:`penalty` is more than zero."""
        return bool(self._config.orth_reg_weight > 0)

    def unfinished(self) -> str | None:
        """Returns a warning for a run that ends with more ranks than its budget, or ``None``."""
        config, allocator = self._config, self._peft.rankallocator
        masks = (config.rank_pattern or {}).values()
        kept = sum(map(sum, masks)) if masks else allocator.init_bgt
        if kept <= allocator.target_bgt:
            return None
        return (
            f"AdaLoRA: training ended after {self.step} optimizer steps with {kept} ranks. Its "
            f"budget is {allocator.target_bgt} (target_r={config.target_r}), at the latest in step "
            f"{config.total_step - config.tfinal + 1} of {config.total_step}. Resume the run, or "
            "train again with a `total_step` that it reaches."
        )

    def after_step(self, held: set[int]) -> None:
        """Updates the importance of ranks from the gradients, and zeroes those out of the budget.

        Args:
            held: The ids of what the optimizer that took a step holds. Nothing happens where it
                holds no part of the adapter, or no part has a gradient.
        """
        mine = [p for p in self._named.values() if id(p) in held]
        grads = [param.grad for param in mine if param.grad is not None]
        # Under 16-mixed a step is left out where gradients overflow.
        if not all(bool(grad.isfinite().all()) for grad in grads) or not grads:
            return
        without = [param for param in self._named.values() if param.grad is None]
        for param in without:
            # PEFT multiplies with the gradient of each.
            param.grad = torch.zeros_like(param)
        _UPDATE(self._peft, self.step)
        for param in without:
            param.grad = None
        self.step += 1

    def state(self) -> dict[str, Any]:
        """Returns the state for a resumed run: tensors on the CPU, numbers and lists."""
        allocator = self._peft.rankallocator
        kept = {
            kind: {name: value.cpu() for name, value in getattr(allocator, kind).items()}
            for kind in _IMPORTANCE
        }
        schedule = {name: getattr(self._config, name) for name in _SCHEDULE}
        return {"step": self.step, **schedule, **kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from what :meth:`state` returned."""
        allocator = self._peft.rankallocator
        self.step = state["step"]
        for name in _SCHEDULE:
            setattr(self._config, name, state[name])
        for kind in _IMPORTANCE:
            values = {
                name: value.to(self._named[name].device) for name, value in state[kind].items()
            }
            setattr(allocator, kind, values)
        # PEFT looks here whether it knows a tensor; the values are those of the step before.
        allocator.ipt = dict(getattr(allocator, _IMPORTANCE[0]))


def rank_budget(module: nn.Module, total_steps: Callable[[], float]) -> RankBudget | None:
    """Returns the budget of the AdaLoRA adapter that trains on ``module``, if there is one."""
    record = require_record(module)
    name = record.active[0]
    entries = [part for part in record.parts.values() if name in part.adapters]
    fields = [part.adapters[name].config for part in entries]
    if not fields or fields[0]["peft_type"] != ADALORA.peft_type:
        return None
    total = total_steps()
    tinit, tfinal = (fields[0][key] for key in ("tinit", "tfinal"))
    if not math.isfinite(total) or tinit >= total - tfinal:
        raise ConfigError(
            f"AdaLoRA with total_step={total:g}, tinit={tinit} and tfinal={tfinal}: ranks are cut "
            "between the first tinit and the last tfinal optimizer steps, and there are none. "
            "Shorten these, set `total_step`, or end the run by max_steps or max_epochs."
        )
    for one in fields:
        one["total_step"] = int(total)
    named = {
        part.qualified(key): param
        for part in entries
        for key, param in adapter_parameters(module.get_submodule(part.name)).items()
        if param.requires_grad
    }
    return RankBudget(named, config_from_dict(fields[0]), name)
