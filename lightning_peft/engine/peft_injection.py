"""Adapters in PEFT's own wrappers, for methods that have no form on the layers themselves."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from torch import nn

from lightning_peft.compat.peft import MultiheadAttention, cast_adapters
from lightning_peft.engine.layers.attention import parameters_of, preserve_parameters
from lightning_peft.engine.methods.lora_config import changes_base
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.model_types import hidden_model_type
from lightning_peft.engine.rollback import floating_tensors, restored_on_error
from lightning_peft.engine.selection.planning import InjectionPlan
from lightning_peft.errors import UnsupportedError


def inject_with_peft(plan: InjectionPlan, config: PeftConfig, adapter_name: str) -> None:
    """Lets PEFT wrap the planned layers; adapters are float32, except where PEFT keeps them.

    Args:
        plan: What to do with the part; its layers are quantized already.
        config: PEFT's config, which means exactly these layers.
        adapter_name: The adapter's name.

    Raises:
        UnsupportedError: If PEFT refuses. The layers are what they were before.
    """
    # As inject_adapter_in_model, which does not give the tuner back.
    tuners: Any = PEFT_TYPE_TO_TUNER_MAPPING
    layers = {name: plan.part.get_submodule(name) for name in plan.targets}
    attentions = {
        name: parameters_of(layer)
        for name, layer in layers.items()
        if isinstance(layer, nn.MultiheadAttention)
    }
    again = " Build the module again: its layers are quantized already." if plan.quantize else ""
    rewritten = floating_tensors(layers.values()) if changes_base(config) else ()
    method = method_of(config)
    unknown = hidden_model_type(plan.part) if method.hides_model_type else nullcontext()
    try:
        with restored_on_error([plan.part], rewritten), unknown:
            made = tuners[config.peft_type](plan.part, config, adapter_name=adapter_name)
            cast_adapters(made, adapter_name)
    except Exception as error:
        raise UnsupportedError(
            f"PEFT cannot inject {type(config).__name__} into {type(plan.part).__name__}: {error}."
            + again
        ) from error
    for name, before in attentions.items():
        wrapper = plan.part.get_submodule(name)
        if isinstance(wrapper, MultiheadAttention):
            preserve_parameters(wrapper, before)
