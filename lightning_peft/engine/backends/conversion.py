"""In-place conversion of a layer's weight between dense and quantized.

A quantized layer stays the object that it was.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_peft.engine.backends.layers import QuantizedBackup, QuantizedLayer
from lightning_peft.engine.backends.loaded import LoadedFormat
from lightning_peft.engine.backends.packed import Share
from lightning_peft.engine.backends.registry import backend_for, backends, claiming_backend
from lightning_peft.engine.layers.kinds import as_rows, from_rows
from lightning_peft.engine.layers.mixin import (
    class_for_key,
    class_key,
    stored_parameter,
    weight_key,
)
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.errors import ConfigError, UnsupportedError

# Parameters from which a layer is worth a call to the allocator.
_TRIM_FROM = 1 << 19
# By the dense weight, which lives only as long as someone else holds it.
_LAYERS: Any = WeakTensorKeyDictionary()


def quantize(
    layer: Any, config: Any, device: torch.device | None = None, share: Share | None = None
) -> None:
    """Quantizes the weight of ``layer`` in place, on ``device``, and frees the dense weight."""
    backend = backend_for(config)
    reason = backend.unsupported_reason(layer)
    if reason is not None:
        raise UnsupportedError(f"A layer cannot be quantized: {reason}.")
    dense = stored_parameter(layer)
    device = device or dense.device
    # Through the dictionary: it keeps the order of parameters, which is part of every optimizer
    # state that is saved by position.
    layer._parameters[weight_key(layer)] = backend.quantize(
        as_rows(layer, dense.data), config, device
    )
    use_backend(layer, config, dense.dtype)
    if share is not None and backend.can_be_packed:
        layer.pack_weight(device, share)
    _LAYERS[dense] = weakref.ref(layer)
    bias = layer._parameters.get("bias")
    if bias is not None:
        bias.data = bias.data.to(device)
    # Freed pages of all layers are more than a part of the codes.
    keeps_much = backend.leaves_freed_memory or share is not None
    trim = keeps_much and device.type == "cpu" and dense.numel() >= _TRIM_FROM
    del dense
    if trim:
        release_freed_memory()


def use_backend(layer: Any, config: Any, dtype: torch.dtype, below_adapters: bool = False) -> None:
    """Gives a layer whose stored weight is quantized the class that computes with it.

    ``dtype`` is that of the weight before. With ``below_adapters`` the class goes below the mixins
    that the layer has, not in front of them.
    """
    backend = backend_for(config)
    mixin = backend.mixin_for(layer)
    assert mixin is not None
    mixins, below, origin = class_key(layer)
    mixins = (*mixins, mixin) if below_adapters else (mixin, *mixins)
    layer.__class__ = class_for_key((mixins, backend.base_class(layer) or below, origin))
    backend.prepare(layer, config, dtype)


def layer_of_dense_weight(param: Tensor) -> Any:
    """The layer whose dense weight ``param`` was until it was quantized, if there is one.

    Whoever took hold of the weight before, such as an optimizer, still has the dense one.
    """
    layer = _LAYERS.get(param)
    return None if layer is None else layer()


def release_freed_memory() -> None:
    """Gives freed heap pages back to the system.

    Dense weights, and what quantization needs besides, are freed in between results that stay, and
    glibc keeps such pages: a quantized model then could hold as much memory as a 16-bit one. Each
    call costs time, also later, when the pages are taken again.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def adopt_prequantized(layer: Any) -> None:
    """Gives a layer that its library or ``from_pretrained`` quantized the safe forward pass."""
    if isinstance(layer, QuantizedLayer):
        return
    backend = claiming_backend(layer)
    if backend is not None:
        backend.adopt(layer)


@contextmanager
def loaded_formats(module: nn.Module, keep: bool = True) -> Iterator[None]:
    """Puts layers of this package in place of those of libraries whose format is read here.

    Other code then meets plain parameters. An error in the body puts the libraries' layers back, as
    does its end without ``keep``. Layers in a layout that cannot be read stay, to be refused.
    """
    made: dict[nn.Module, nn.Module] = {}
    places = []
    for owner in module.modules():
        for name, layer in owner._modules.items():
            backend = None if layer is None else claiming_backend(layer)
            if layer is None or not isinstance(backend, LoadedFormat):
                continue
            if layer not in made and backend.reading_problem(layer) is None:
                made[layer] = backend.replacement(layer)
            if layer in made:
                places.append((owner, name, layer))
    for owner, name, layer in places:
        owner._modules[name] = made[layer]
    done = False
    try:
        yield
        done = True
    finally:
        if not (done and keep):
            for owner, name, layer in places:
                owner._modules[name] = layer
    for backend in backends():
        if keep and isinstance(backend, LoadedFormat):
            backend.forget(module)


def lay_out_loaded_format(model: nn.Module, settings: Any) -> None:
    """Gives a model on the meta device the layers of the format that ``settings`` name, if any.

    Raises:
        ConfigError: If what loading takes, such as the format's library, is not there.
    """
    fields = settings if isinstance(settings, Mapping) else vars(settings)
    method = str(to_primitives(fields.get("quant_method")))
    for backend in backends():
        if isinstance(backend, LoadedFormat) and backend.name == method:
            try:
                backend.lay_out(model, settings)
            except (ImportError, RuntimeError) as error:
                raise ConfigError(
                    f"The base is stored in the format {method}, whose library counts its bytes: "
                    f"{error} Install it, or plan for the base of 16 bits."
                ) from error


def convert_to_dense(layer: Any, weight: Tensor) -> QuantizedBackup:
    """Makes ``layer`` dense with ``weight``; returns the backup for :func:`restore_quantized`."""
    backend = layer.backend
    attributes = {
        name: layer.__dict__.pop(name)
        for name in backend.layer_attributes
        if name in layer.__dict__
    }
    mixins, base, origin = key = class_key(layer)
    backup = QuantizedBackup(layer._parameters[weight_key(layer)], attributes, key)
    if issubclass(origin, backend.module_classes):
        origin = nn.Linear
    others = tuple(mixin for mixin in mixins if not issubclass(mixin, QuantizedLayer))
    layer.__class__ = class_for_key((others, origin, origin))
    layer._parameters[weight_key(layer)] = nn.Parameter(weight, requires_grad=False)
    return backup


def restore_quantized(layer: Any, backup: QuantizedBackup) -> None:
    """Puts a quantized weight back, bit for bit, on the device where the layer is now."""
    device = stored_parameter(layer).device
    kind: Any = class_for_key(backup.key)
    # Before the class: this may fail, and a quantized class over a dense weight computes nothing.
    layer._parameters[weight_key(layer)] = kind.backend.restore(backup.weight, device)
    layer.__class__ = kind
    layer.__dict__.update(backup.attributes)


def requantize(layer: Any, weight: Tensor) -> Tensor | None:
    """What ``weight`` becomes when it is quantized again as ``layer`` is; ``None`` if unknown.

    The merge report uses it for what re-quantizing would cost.
    """
    rows = as_rows(layer, weight)
    again = layer.backend.requantize(layer._parameters[weight_key(layer)], rows)
    return None if again is None else from_rows(layer, again)
