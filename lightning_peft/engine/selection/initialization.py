"""Compatibility of PEFT's initializations with layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.engine.backends.registry import backend_for, is_quantized
from lightning_peft.engine.layers.kinds import LINEAR_LIKE
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.methods.lora_config import (
    changes_base,
    loftq_settings,
    needs_data,
    rank_of,
)


def initialization_problems(
    layers: Mapping[str, nn.Module],
    config: PeftConfig,
    holders: Mapping[int, list[str]],
    in_place: bool,
    quantization: Any | None,
) -> list[str]:
    """Why ``init_lora_weights`` cannot be carried out on some layers.

    PEFT finds out in the middle of its work, when weights are rewritten already, or not at all.
    """
    init: Any = getattr(config, "init_lora_weights", True)
    problems = []
    for name, layer in layers.items():
        if not isinstance(layer, LINEAR_LIKE) and init not in (True, False, None, "gaussian"):
            problems.append(f"{name}: {init!r} is for linear layers, not a {type(layer).__name__}")
            continue
        if init == "orthogonal" and rank_of(config, name) % 2:
            problems.append(f"{name}: 'orthogonal' needs an even rank, not {rank_of(config, name)}")
        if changes_base(config):
            problem = _rewriting_problem(layer, init, rank_of(config, name), holders, in_place)
            problems += [f"{name}: {init!r} {problem}"] if problem else []
    if needs_data(config) and changes_base(config) and quantization is not None:
        problems.append(
            f"{init!r} rewrites the dense weight once there are batches, and the layers are "
            "quantized before. Use LoRAStrategy, or 'eva', which leaves the base as it is"
        )
    settings = loftq_settings(config)
    if settings and quantization is not None:
        bits = backend_for(quantization).bits
        if bits != settings["loftq_bits"]:
            problems.append(f"loftq_config={settings} is not for a base of {bits} bits")
    return problems


def _rewriting_problem(
    layer: Any, init: str, rank: int, holders: Mapping[int, list[str]], in_place: bool
) -> str | None:
    weight = stored_parameter(layer)
    if is_quantized(layer):
        return "decomposes the dense weight, and the layer is quantized already. Load it dense"
    if weight.is_meta:
        return "decomposes the weight, which has no values on the meta device"
    taken = 2 * rank if init == "lora_ga" else rank
    if taken > min(weight.shape):
        return f"takes {taken} singular vectors of a weight that has {min(weight.shape)}"
    if isinstance(layer, Conv1D) and init == "olora":
        return "takes a Conv1D weight transposed. Use 'pissa'"
    if len(holders[id(weight)]) > 1:
        return "would rewrite a weight that other layers share"
    if init in ("loftq", "corda", "lora_ga") and not in_place:
        return "is for plain LoRA, on the layers themselves. Leave lora_bias out"
    return None
