"""Adapters on the layers themselves: PEFT makes them, and the layers take them over."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from lightning_peft.compat.peft import in_place_tuner
from lightning_peft.engine.backends.conversion import quantize
from lightning_peft.engine.layers.adapter import attach
from lightning_peft.engine.layers.sizes import weight_sizes
from lightning_peft.engine.loading.streamed_quantizer import deferred_dtype
from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.engine.model_types import hidden_model_type
from lightning_peft.engine.selection.planning import InjectionPlan, InjectionRequest


def inject_in_place(
    plan: InjectionPlan,
    method: InPlaceMethod,
    config: PeftConfig,
    request: InjectionRequest,
    device: torch.device | None,
) -> None:
    """Adds adapters to the planned layers, which stay where they are, and quantizes them.

    Args:
        plan: What to do with the part.
        method: The method.
        config: PEFT's config, which means exactly these layers.
        request: The requested adapters.
        device: Where quantization happens.
    """
    to_quantize = {id(plan.part.get_submodule(name)) for name in plan.quantize}
    name = request.adapter_name

    def create(original: Any, layer: nn.Module, options: dict[str, Any]) -> Any:
        with weight_sizes(layer):
            made = method.create(original, layer, name, config, options)
        dtype = deferred_dtype(layer)
        if dtype is not None:
            # As if the weight were quantized after this.
            kind: Any = method.layer_class(layer)
            tensors = [x for a in kind.adapter_layer_names for x in getattr(made, a).parameters()]
            for param in tensors:
                param.data = param.data.to(dtype).to(param.dtype)
        return made

    def place(layer: nn.Module, made: nn.Module) -> None:
        kind: Any = method.layer_class(layer)
        # After PEFT's init, which may need the dense weight, and before the adapter moves over.
        if request.quantization is not None and id(layer) in to_quantize:
            quantize(layer, request.quantization, device)
        attach(layer, kind, made, name)

    with hidden_model_type(plan.part) if method.hides_model_type else nullcontext():
        in_place_tuner(config.peft_type)(plan.part, config, name, create, place)
    # PEFT leaves its config on the model as a mark of wrapped layers, and there are none.
    del plan.part.peft_config
    rest = [other for other in plan.quantize if other not in set(plan.targets)]
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
