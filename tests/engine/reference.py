"""What tests of the engine compare with: PEFT's own model around a copy of the same base."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lightning_peft.engine.adapters import adapter_parameters


def peft_model(base: nn.Module, config: PeftConfig) -> Any:
    """Returns PEFT's model around a copy of ``base``."""
    return get_peft_model(copy.deepcopy(base), copy.deepcopy(config))


def without_repacking(model: nn.Module) -> nn.Module:
    """Turns off bitsandbytes' own CPU repacking, which a reference must not meet either."""
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def randomize(module: nn.Module, scale: float = 0.1) -> dict[str, Tensor]:
    """Gives every adapter tensor of ``module`` new values, as training would, and returns them."""
    values = {}
    for name, param in adapter_parameters(module).items():
        param.copy_(torch.randn_like(param) * scale)
        values[name] = param.detach().clone()
    return values


@torch.no_grad()
def copy_adapter(module: nn.Module, reference: PeftModel, prefix: str = "base_model.model.") -> int:
    """Copies all adapter values of ``module`` into PEFT's model; returns how many tensors."""
    theirs = dict(reference.named_parameters())
    mine = adapter_parameters(module)
    for name, param in mine.items():
        theirs[f"{prefix}{name}"].copy_(param)
    return len(mine)


def output_of(model: Any, batch: Any) -> Tensor:
    """Returns logits of a transformers model, or the output of another one."""
    result = model(**batch) if isinstance(batch, dict) else model(batch)
    return result if isinstance(result, Tensor) else result.logits


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Returns ``||value - expected|| / ||expected||``, in float64."""
    value, expected = value.detach().double(), expected.detach().double()
    return ((value - expected).norm() / expected.norm()).item()
