"""PEFT's defaults by ``config.model_type``.

Here the layers are chosen before PEFT sees them. PEFT would choose once more: it widens the targets
of models whose experts transformers 5 stacks into one parameter, and refuses layers of state space
models whose fused kernels read the weight without calling the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from lightning_peft.compat.peft import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
    is_refused_target,
)


@contextmanager
def hidden_model_type(part: nn.Module) -> Iterator[None]:
    """Within the body, ``part`` has no ``config`` that PEFT could decide by."""
    config = part.__dict__.pop("config", None)
    try:
        yield
    finally:
        if config is not None:
            part.config = config


def fused_kernel_problem(part: nn.Module, target: str) -> str | None:
    """Returns why a wrapper around ``target`` would be ignored by fused kernels, or ``None``."""
    if not is_refused_target(part, target.rpartition(".")[2]):
        return None
    kind = getattr(part.config, "model_type", type(part).__name__)
    return f"{target}: the fused kernels of {kind} read its weight without calling the layer"


def retargeted_by_peft(part: Any, config: PeftConfig) -> list[str]:
    """Returns a phrase for each field that PEFT changes when it loads an adapter onto ``part``."""
    if getattr(getattr(part, "config", None), "model_type", None) is None:
        return []
    theirs: Any = copy.deepcopy(config)
    try:
        mapping = get_model_conversion_mapping(part)
        convert_peft_config_for_transformers(theirs, model=part, conversions=mapping)
    except (KeyError, ValueError) as error:
        return [str(error)]
    names = ("target_modules", "target_parameters")
    pairs = [(name, getattr(config, name, None), getattr(theirs, name, None)) for name in names]
    return [
        f"{name} becomes {_listed(after)}"
        for name, before, after in pairs
        if _listed(before) != _listed(after)
    ]


def taken_for_experts(part: Any, targets: Iterable[str]) -> list[str]:
    """Returns those of the layers ``targets`` that PEFT would take for weights of experts.

    Dense layers have the names that experts had before transformers 5 stacked them.
    """
    leaves = {name: name.rpartition(".")[2] for name in targets}
    moved = {
        leaf
        for leaf in set(leaves.values())
        if retargeted_by_peft(part, LoraConfig(target_modules=[leaf]))
    }
    return [name for name, leaf in leaves.items() if leaf in moved]


def _listed(value: Any) -> Any:
    return value if isinstance(value, str) else sorted(value or ())
