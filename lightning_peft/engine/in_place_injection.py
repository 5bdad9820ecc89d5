"""Adapters on the layers themselves: PEFT makes them, and the layers take them over."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from lightning_peft.compat.peft import LoraTuner
from lightning_peft.engine.backends.conversion import quantize
from lightning_peft.engine.layers.convolution_adapters import TransposedFactors, bare_convolution
from lightning_peft.engine.layers.kinds import CONVOLUTIONS, TRANSPOSED
from lightning_peft.engine.layers.lora import attach
from lightning_peft.engine.layers.sizes import weight_sizes
from lightning_peft.engine.loading.streamed_quantizer import deferred_dtype
from lightning_peft.engine.model_types import hidden_model_type
from lightning_peft.engine.selection.planning import InjectionPlan, InjectionRequest


def inject_in_place(
    plan: InjectionPlan, config: PeftConfig, request: InjectionRequest, device: torch.device | None
) -> None:
    """Adds LoRA adapters to the planned layers, which stay where they are, and quantizes them.

    Args:
        plan: What to do with the part.
        config: PEFT's config, which means exactly these layers.
        request: The requested adapters.
        device: Where quantization happens.
    """
    to_quantize = {id(plan.part.get_submodule(name)) for name in plan.quantize}
    made: Any = config

    def create(original: Any, layer: nn.Module, options: dict[str, Any]) -> nn.Module:
        if isinstance(layer, TRANSPOSED):
            return TransposedFactors(layer, request.adapter_name, made, options)
        if isinstance(layer, CONVOLUTIONS):
            # PEFT makes `A` of the class of the layer, which may be ours or the user's own.
            layer = bare_convolution(layer)
        with weight_sizes(layer):
            wrapper: Any = original(layer)
        dtype = deferred_dtype(layer)
        if dtype is not None:
            # As if the weight were quantized after this.
            for factors in (wrapper.lora_A, wrapper.lora_B):
                for param in factors[request.adapter_name].parameters():
                    param.data = param.data.to(dtype).to(param.dtype)
        return wrapper

    def place(layer: nn.Module, wrapper: nn.Module) -> None:
        # After PEFT's init, which may need the dense weight, and before the adapter moves over.
        if request.quantization is not None and id(layer) in to_quantize:
            quantize(layer, request.quantization, device)
        attach(layer, wrapper, request.adapter_name)

    with hidden_model_type(plan.part):
        LoraTuner(plan.part, made, request.adapter_name, create, place)
    # PEFT leaves its config on the model as a mark of wrapped layers, and there are none.
    del plan.part.peft_config
    rest = [name for name in plan.quantize if name not in set(plan.targets)]
    quantize_layers(plan.part, rest, request.quantization, device)


def quantize_layers(
    part: nn.Module,
    names: list[str],
    config: Any | None,
    device: torch.device | None,
) -> None:
    """Quantizes the layers ``names`` of ``part``."""
    for name in names:
        assert config is not None
        quantize(part.get_submodule(name), config, device)
