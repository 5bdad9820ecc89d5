"""Adapters and quantized layers on the meta device, for planning.

For predictions of memory. Tensors on the meta device, or fake ones, go through the same injection
and the same forward pass as real ones; only the values are missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from lightning_peft.compat.torch import FakeTensor
from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.backends.conversion import use_backend
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.backends.registry import backend_for, backend_of
from lightning_peft.engine.injection import inject
from lightning_peft.engine.layers.expert_weights import expose_experts, exposed_experts
from lightning_peft.engine.layers.kinds import as_rows
from lightning_peft.engine.layers.mixin import (
    DynamicMixin,
    class_key,
    stored_parameter,
    weight_key,
)
from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.engine.methods.lora_config import needs_data
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.record import Record, adapted_parts
from lightning_peft.engine.selection.planning import (
    InjectionPlan,
    InjectionRequest,
    layers_to_quantize,
    make_plans,
)
from lightning_peft.errors import UnsupportedError


def inject_on_meta(
    module: nn.Module,
    peft_config: PeftConfig,
    quantization_config: Any | None = None,
    adapt: str | list[str] | None = None,
) -> list[str]:
    """Adds adapters to a module on the meta device.

    Returns:
        The names of the layers that the injection of a module with values would quantize; they
        are dense still, and :func:`quantize_on_meta` makes them codes.
    """
    names: list[str] = []
    if quantization_config is not None:
        problem = backend_for(quantization_config).planning_problem(quantization_config)
        if problem is not None:
            raise UnsupportedError(f"{problem}.")
        request = InjectionRequest(peft_config, None, "default")
        with exposed_experts(module):
            for plan in make_plans(module, request, adapt, Record()):
                prefix = f"{plan.name}." if plan.name else ""
                chosen = layers_to_quantize(plan, quantization_config)
                names += [prefix + name for name in chosen]
        if not names:
            raise UnsupportedError(
                f"Nothing to quantize in {type(module).__name__}: there is no linear layer besides "
                "heads, saved modules and tied weights. Plan for LoRA."
            )
    if needs_data(peft_config):
        # Sizes are those from before the ranks are moved, whose sum stays.
        peft_config = copy.copy(peft_config)
        peft_config.init_lora_weights = True  # type: ignore[attr-defined]
    inject(module, peft_config, adapt=adapt)
    if names:
        # Those without an adapter are quantized by their layers too.
        expose_experts(module)
    return names


def quantize_on_meta(layer: Any, config: Any) -> None:
    """Makes a layer without values the quantized layer that quantizing would make of it."""
    # PEFT's own wrappers, for adapters that are not in place.
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    dense = stored_parameter(layer)
    layer._parameters[weight_key(layer)] = backend_for(config).meta(
        as_rows(layer, dense.detach()), config
    )
    use_backend(layer, config, dense.dtype, below_adapters=True)


def quantizable_layers(module: nn.Module, config: Any) -> list[str]:
    """Returns the names of the dense layers that ``config`` would have quantized in ``module``."""
    found = []
    expose_experts(module)
    for entry, part in adapted_parts(module):
        info = next(iter(entry.adapters.values()))
        plan = InjectionPlan(entry.name, part, list(info.targets), entry.saved, entry.heads)
        method = method_of(info.config)
        plan.in_place = method if info.in_place and isinstance(method, InPlaceMethod) else None
        # The factors of adapters are linear layers too.
        factors = {name.rpartition(".")[0] for name in adapter_parameters(part)}
        # In place, the class of a layer is one that was made for it.
        with _original_classes(part):
            names = [name for name in layers_to_quantize(plan, config) if name not in factors]
        found += [entry.qualified(name) for name in names]
    return found


@contextmanager
def _original_classes(part: nn.Module) -> Iterator[None]:
    extended: list[Any] = [child for child in part.modules() if isinstance(child, DynamicMixin)]
    before = [type(child) for child in extended]
    try:
        for child in extended:
            child.__class__ = class_key(child)[2]
        yield
    finally:
        for child, cls in zip(extended, before, strict=True):
            child.__class__ = cls


def is_materialized(tensor: Tensor) -> bool:
    """Whether ``tensor`` has numbers that can be looked at."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def float32_products(module: nn.Module) -> int:
    """Returns how many quantized layers follow a float32 base in the dtype of their products."""
    layers = [one for one in module.modules() if isinstance(one, QuantizedLayer)]
    return sum(
        one.compute_dtype is None and one.weight_info()[1] == torch.float32 for one in layers
    )


def quantized_tensors(module: nn.Module) -> list[Tensor]:
    """Returns every tensor that quantized weights of ``module`` consist of, tables included."""
    found: list[Tensor] = []
    for param in module.parameters():
        backend = backend_of(param)
        if backend is not None:
            found += [param, *backend.constants(param), *backend.tables(param)]
    return found


def recreate_parameter(tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Any:
    """Returns a parameter or buffer with other tensors, also those of its quantization."""
    backend = backend_of(tensor)
    if backend is not None:
        return backend.map_tensors(tensor, make)
    made: Any = make(tensor)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
