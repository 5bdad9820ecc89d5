"""Adapters and 4-bit layers without values: the shapes of what the engine would hold.

For predictions of memory. Tensors on the meta device, or fake ones, go through the same injection
and the same forward pass as real ones; only the values are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
from bitsandbytes.functional import QuantState
from peft import PeftConfig
from torch import Tensor, float32, nn, uint8
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lightning_peft.compat.torch import FakeTensor
from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.injection import inject
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, as_rows
from lightning_peft.engine.layers.mixin import (
    DynamicMixin,
    class_for_key,
    class_key,
    stored_parameter,
)
from lightning_peft.engine.layers.quantization import _fill_linear4bit
from lightning_peft.engine.layers.quantized import (
    FourBitConvolution,
    FourBitLayer,
    quantization_constants,
)
from lightning_peft.engine.record import Record, require_record
from lightning_peft.engine.selection.planning import (
    InjectionPlan,
    InjectionRequest,
    layers_to_quantize,
    make_plans,
)
from lightning_peft.errors import UnsupportedError

# bitsandbytes' defaults: weights in a block, and blocks whose constants share one of their own.
BLOCK, OUTER_BLOCK = 64, 256


def inject_on_meta(
    module: nn.Module,
    peft_config: PeftConfig,
    quantization_config: BitsAndBytesConfig | None = None,
    adapt: str | list[str] | None = None,
) -> list[str]:
    """Adds adapters to a module on the meta device.

    Args:
        module: A module without adapters whose tensors are all on the meta device.
        peft_config: As for :func:`lightning_peft.inject`.
        quantization_config: 4-bit settings, or ``None``.
        adapt: Names of the parts to adapt.

    Returns:
        The names of the layers that the injection of a module with values would quantize; they
        are dense still, and :func:`quantize_on_meta` makes them codes.

    Raises:
        ConfigError, TargetModulesError, LifecycleError, UnsupportedError: As
            :func:`lightning_peft.inject`.
    """
    names: list[str] = []
    if quantization_config is not None:
        if quantization_config.load_in_8bit:
            raise UnsupportedError(
                "load_in_8bit=True: memory of 8-bit layers is not predicted. Plan for 4 bits, or "
                "for LoRA."
            )
        for plan in make_plans(
            module, InjectionRequest(peft_config, None, "default"), adapt, Record()
        ):
            prefix = f"{plan.name}." if plan.name else ""
            names += [prefix + name for name in layers_to_quantize(plan, quantization_config)]
        if not names:
            raise UnsupportedError(
                f"Nothing to quantize in {type(module).__name__}: there is no linear layer besides "
                "heads, saved modules and tied weights. Plan for LoRA."
            )
    inject(module, peft_config, adapt=adapt)
    return names


def quantize_on_meta(layer: Any, config: BitsAndBytesConfig) -> None:
    """Makes a layer without values the 4-bit layer that quantizing would make of it.

    Args:
        layer: A layer named by :func:`inject_on_meta`.
        config: The same 4-bit settings.
    """
    # PEFT's own wrappers, for adapters that are not in place.
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    dense = stored_parameter(layer, "weight")
    rows = as_rows(layer, dense.detach())
    blocks = -(-rows.numel() // BLOCK)
    nested = None
    if config.bnb_4bit_use_double_quant:
        outer = rows.new_empty(-(-blocks // OUTER_BLOCK), dtype=float32)
        nested = QuantState(
            absmax=outer, blocksize=OUTER_BLOCK, code=outer.new_empty(256), dtype=float32
        )
    state = QuantState(
        absmax=rows.new_empty(blocks, dtype=uint8 if nested else float32),
        shape=rows.shape,
        dtype=rows.dtype,
        blocksize=BLOCK,
        code=rows.new_empty(16, dtype=float32),
        quant_type=config.bnb_4bit_quant_type,
        offset=rows.new_empty((), dtype=float32) if nested else None,
        state2=nested,
    )
    codes: Any = nn.Parameter(rows.new_empty((rows.numel() + 1) // 2, 1, dtype=uint8), False)
    codes.quant_state = state
    layer._parameters["weight"] = codes
    # Below the adapters, which are there already.
    mixins, below, origin = class_key(layer)
    kernel = isinstance(layer, CONVOLUTION_LIKE)
    mixins = (*mixins, FourBitConvolution if kernel else FourBitLayer)
    linear = not kernel and not isinstance(layer, Conv1D)
    layer.__class__ = class_for_key((mixins, bnb.nn.Linear4bit if linear else below, origin))
    if linear:
        _fill_linear4bit(layer)
    layer.compute_dtype = config.bnb_4bit_compute_dtype


def quantizable_layers(module: nn.Module, config: BitsAndBytesConfig) -> list[str]:
    """Returns the names of the dense layers that ``config`` would have quantized in ``module``.

    Args:
        module: A module with adapters.
        config: 4-bit settings.
    """
    found = []
    for entry in require_record(module).parts.values():
        info = next(iter(entry.adapters.values()))
        part = module.get_submodule(entry.name)
        plan = InjectionPlan(entry.name, part, list(info.targets), entry.saved, entry.heads)
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
    """Says whether ``tensor`` has numbers that can be looked at."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def quantized_tensors(module: nn.Module) -> list[Tensor]:
    """Returns every tensor that 4-bit weights of ``module`` consist of, code tables included."""
    found: list[Tensor] = []
    for param in module.parameters():
        state = getattr(param, "quant_state", None)
        if state is not None:
            tables = [state.code, *([state.state2.code, state.offset] if state.nested else [])]
            found += [param, *quantization_constants(param), *tables]
    return found


def recreate_parameter(tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Any:
    """Returns a parameter or buffer made anew, with the constants of its quantization.

    Args:
        tensor: The parameter or buffer.
        make: Returns a tensor of the same shape, without values.
    """
    made: Any = make(tensor)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
            setattr(made, name, getattr(tensor, name, None))
        made.quant_state = _recreate_state(state, make)
    return made


def _recreate_state(state: Any, make: Callable[[Tensor], Tensor]) -> Any:
    inner = state.state2
    return QuantState(
        absmax=make(state.absmax),
        shape=state.shape,
        dtype=state.dtype,
        blocksize=state.blocksize,
        code=make(state.code),
        quant_type=state.quant_type,
        offset=make(state.offset) if state.nested else None,
        state2=_recreate_state(inner, make) if state.nested else None,
    )
