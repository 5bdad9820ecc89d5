"""Creation of adapters by PEFT: in place, or in PEFT's wrappers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from torch import nn

from lightning_peft.compat.peft import cast_adapters, in_place_tuner
from lightning_peft.engine.backends.conversion import quantize
from lightning_peft.engine.backends.packed import Share, current_share
from lightning_peft.engine.layers.adapter import attach
from lightning_peft.engine.layers.attention import PROJECTION
from lightning_peft.engine.layers.sizes import weight_sizes
from lightning_peft.engine.loading.streamed_quantizer import deferred_dtype
from lightning_peft.engine.loftq import loftq
from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.engine.methods.lora_config import changes_base, loftq_settings, needs_data
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.model_types import hidden_model_type
from lightning_peft.engine.rollback import floating_tensors, restored_on_error
from lightning_peft.engine.selection.planning import InjectionPlan, InjectionRequest
from lightning_peft.errors import UnsupportedError


def inject_in_place(
    plan: InjectionPlan,
    method: InPlaceMethod,
    config: PeftConfig,
    request: InjectionRequest,
    device: torch.device | None,
) -> None:
    """Adds adapters to the planned layers, which stay where they are, and quantizes them."""
    to_quantize = {id(plan.part.get_submodule(name)) for name in plan.quantize}
    name = request.adapter_name
    rows = {id(plan.part.get_submodule(target)): rows for target, rows in plan.rows.items()}

    by_loftq = loftq_settings(config)
    if by_loftq is not None or (needs_data(config) and changes_base(config)):
        # Values that are written over, here or when there are batches.
        config.init_lora_weights = by_loftq is None  # type: ignore[attr-defined]

    def create(original: Any, layer: nn.Module, options: dict[str, Any]) -> Any:
        with weight_sizes(layer):
            made = method.create(original, layer, name, config, options)
        if by_loftq is not None:
            later = request.quantization if id(layer) in to_quantize else None
            loftq(layer, made, name, by_loftq, later)
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
            quantize(layer, request.quantization, device, current_share())
        attach(layer, kind, made, name)
        if id(layer) in rows:
            limited: Any = layer
            limited.limit_rows(name, rows[id(layer)])
        behind = made.__dict__.get("behind")
        if behind is not None:
            place(layer.get_submodule(PROJECTION), behind)

    with hidden_model_type(plan.part) if method.hides_model_type else nullcontext():
        in_place_tuner(config.peft_type)(plan.part, config, name, create, place)
    # PEFT leaves its config on the model as a mark of wrapped layers, and there are none.
    del plan.part.peft_config
    rest = [other for other in plan.quantize if other not in set(plan.targets)]
    quantize_layers(plan.part, rest, request.quantization, device, current_share())


def quantize_layers(
    part: nn.Module,
    names: list[str],
    config: Any | None,
    device: torch.device | None,
    share: Share | None = None,
) -> None:
    """Quantizes the layers ``names`` of ``part``, and keeps ``share`` of each."""
    for name in names:
        assert config is not None
        quantize(part.get_submodule(name), config, device, share)


def inject_with_peft(plan: InjectionPlan, config: PeftConfig, adapter_name: str) -> None:
    """Lets PEFT wrap the planned layers; adapters are float32, except where PEFT keeps them."""
    # As inject_adapter_in_model, which does not give the tuner back.
    tuners: Any = PEFT_TYPE_TO_TUNER_MAPPING
    layers = [plan.part.get_submodule(name) for name in plan.targets]
    again = " Build the module again: its layers are quantized already." if plan.quantize else ""
    rewritten = floating_tensors(layers) if changes_base(config) else ()
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
