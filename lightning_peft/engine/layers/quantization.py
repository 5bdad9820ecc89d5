"""Turning the dense weight of a layer into a quantized one and back, in place.

A quantized layer stays the object that it was; :mod:`.quantized` has what it then does.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lightning_peft.engine.layers.codes import make_params4bit
from lightning_peft.engine.layers.kinds import (
    CONVOLUTION_LIKE,
    as_rows,
    from_rows,
    has_quantizable_class,
)
from lightning_peft.engine.layers.mixin import (
    ClassKey,
    add_mixin,
    class_for_key,
    class_key,
    stored_parameter,
)
from lightning_peft.engine.layers.quantized import (
    EightBitLayer,
    FourBitConvolution,
    FourBitLayer,
    QuantizedLayer,
    as_params4bit,
)
from lightning_peft.errors import UnsupportedError

# Weights from which an 8-bit layer is worth a call to the allocator.
_TRIM_FROM = 1 << 19
# By the dense weight, which lives only as long as someone else holds it.
_LAYERS: Any = WeakTensorKeyDictionary()


def quantize(
    layer: nn.Module, config: BitsAndBytesConfig, device: torch.device | None = None
) -> None:
    """Quantizes the weight of ``layer`` in place, on ``device``, and frees the dense weight.

    Args:
        layer: ``nn.Linear``, transformers' ``Conv1D`` or a convolution, with a dense weight.
        config: 4-bit or 8-bit settings. ``bnb_4bit_compute_dtype`` holds for the product.
        device: Where the quantized weight ends up; ``None`` leaves it where it is.

    Raises:
        UnsupportedError: If :func:`quantization_unsupported_reason` has a reason.
    """
    reason = quantization_unsupported_reason(layer, config)
    if reason is not None:
        raise UnsupportedError(f"A layer cannot be quantized: {reason}.")
    dense = stored_parameter(layer, "weight")
    device = device or dense.device
    if config.load_in_8bit:
        _to_8bit(layer, dense, config, device)
    else:
        _to_4bit(layer, dense, config, device)
    _LAYERS[dense] = weakref.ref(layer)
    bias = layer._parameters.get("bias")
    if bias is not None:
        bias.data = bias.data.to(device)
    if config.load_in_8bit and device.type == "cpu" and dense.numel() >= _TRIM_FROM:
        del dense
        release_freed_memory()


def layer_of_dense_weight(param: Tensor) -> Any:
    """Returns the layer whose dense weight ``param`` was until it was quantized, if there is one.

    Whoever took hold of the weight before, such as an optimizer, still has the dense one.
    """
    layer = _LAYERS.get(param)
    return None if layer is None else layer()


def quantization_unsupported_reason(layer: nn.Module, config: BitsAndBytesConfig) -> str | None:
    """Returns why ``layer`` cannot be quantized right, or ``None`` where it can."""
    kind = type(layer).__name__
    if not has_quantizable_class(layer):
        return (
            f"it is a {kind}, and only linear layers and convolutions of torch and transformers "
            "themselves can be, since a subclass may compute in its own way. Name it in "
            "`llm_int8_skip_modules`"
        )
    if isinstance(layer, CONVOLUTION_LIKE) and config.load_in_8bit:
        return (
            f"it is a {kind}, and bitsandbytes has 8-bit products for linear layers only. Use "
            "`load_in_4bit=True`, or LoRAStrategy"
        )
    if isinstance(layer, Conv1D) and config.load_in_8bit:
        return (
            "transformers' Conv1D (GPT-2 and relatives) stores its weight transposed, which 8-bit "
            "layers cannot. Use `load_in_4bit=True`, or LoRAStrategy"
        )
    if stored_parameter(layer, "weight").is_meta:
        return (
            "it is on the meta device and has no values. Inject without a quantization config "
            "there, or load the weights first"
        )
    return None


def release_freed_memory() -> None:
    """Gives freed heap pages back to the system.

    Dense weights, and what bitsandbytes' quantization needs besides, are freed in between results
    that stay, and glibc keeps such pages: a quantized model then could hold as much memory as a
    16-bit one. Each call costs time, also later, when the pages are taken anew.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _to_4bit(
    layer: Any, dense: nn.Parameter, config: BitsAndBytesConfig, device: torch.device
) -> None:
    rows = as_rows(layer, dense.data)
    # Through the dictionary here and below: it keeps the order of parameters, which is part of
    # every optimizer state that is saved by position.
    layer._parameters["weight"] = make_params4bit(rows, config, device)
    convert_to_4bit(layer, config)


def convert_to_4bit(layer: Any, config: BitsAndBytesConfig) -> None:
    """Gives a layer whose stored weight is codes already the class that computes with them.

    Args:
        layer: A layer whose weight is a ``bitsandbytes.nn.Params4bit``.
        config: 4-bit settings; ``bnb_4bit_compute_dtype`` holds for the product.
    """
    if isinstance(layer, CONVOLUTION_LIKE):
        add_mixin(layer, FourBitConvolution)
    elif isinstance(layer, Conv1D):
        add_mixin(layer, FourBitLayer)
    else:
        # bitsandbytes' own class below ours: others recognise quantized layers by it.
        add_mixin(layer, FourBitLayer, base=bnb.nn.Linear4bit)
        _fill_linear4bit(layer)
    layer.compute_dtype = config.bnb_4bit_compute_dtype


def _fill_linear4bit(layer: Any) -> None:
    """Sets what the constructor of ``bitsandbytes.nn.Linear4bit`` would have set."""
    layer.compute_type_is_set = True
    layer.quant_state = None
    layer.quant_storage = torch.uint8
    layer.support_avx512bf16_for_cpu = False


def _to_8bit(
    layer: Any, dense: nn.Parameter, config: BitsAndBytesConfig, device: torch.device
) -> None:
    donor = bnb.nn.Linear8bitLt(
        1, 1, has_fp16_weights=False, threshold=config.llm_int8_threshold, device="meta"
    )
    # Moved while dense: bitsandbytes quantizes on the way from the CPU only.
    packed: Any = bnb.nn.Int8Params(dense.data.cpu(), requires_grad=False, has_fp16_weights=False)
    layer._parameters["weight"] = packed = packed.to(device)
    packed.CB = None
    add_mixin(layer, EightBitLayer, base=bnb.nn.Linear8bitLt)
    layer.state, layer.index = donor.state, None
    layer.dense_dtype = dense.dtype


def adopt_prequantized(layer: Any) -> None:
    """Gives a layer that bitsandbytes or ``from_pretrained`` quantized the safe forward pass.

    Raises:
        UnsupportedError: If the weight is not quantized yet, or stays in 16 bits.
    """
    if isinstance(layer, bnb.nn.Linear4bit) and not isinstance(layer, QuantizedLayer):
        _adopt_4bit(layer)
    elif isinstance(layer, bnb.nn.Linear8bitLt) and not isinstance(layer, QuantizedLayer):
        _adopt_8bit(layer)


def _adopt_4bit(layer: Any) -> None:
    _require_codes(layer, layer.weight.quant_state is not None)
    # Reading the state dict undoes bitsandbytes' CPU repacking, if it already happened, up to the
    # rounding of the constants. Those of single quantization it leaves transposed, so that each
    # block of weights would be scaled by the constant of another one.
    layer.state_dict()
    state = layer.weight.quant_state
    if state.absmax.ndim == 2:
        state.absmax = state.absmax.t().reshape(-1).float()
    chosen = layer.compute_dtype if layer.compute_type_is_set else None
    add_mixin(layer, FourBitLayer)
    _fill_linear4bit(layer)
    layer.compute_dtype = chosen


def _adopt_8bit(layer: Any) -> None:
    weight, state = layer.weight, layer.state
    _require_codes(layer, weight.dtype == torch.int8 and not state.has_fp16_weights)
    # After the first forward pass, bitsandbytes keeps the scales in the state only.
    weight.SCB = weight.SCB if weight.SCB is not None else state.SCB
    weight.CB = None
    add_mixin(layer, EightBitLayer)
    layer.dense_dtype = torch.float16 if layer.bias is None else layer.bias.dtype


def _require_codes(layer: Any, quantized: bool) -> None:
    if not quantized:
        raise UnsupportedError(
            f"A {type(layer).__name__} layer still holds its dense weight. bitsandbytes quantizes "
            "when a layer moves to a device: call module.to(device) before adapters are added."
        )


@dataclass
class QuantizedBackup:
    """Everything that :func:`convert_to_dense` takes off a layer, so that it can be put back."""

    weight: nn.Parameter
    attributes: dict[str, Any]
    key: ClassKey


_QUANTIZED_ATTRIBUTES = (
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
    "state",
    "index",
    "dense_dtype",
)


def convert_to_dense(layer: Any, weight: Tensor) -> QuantizedBackup:
    """Replaces the quantized weight of ``layer`` by a dense one; the layer's class goes back.

    Returns:
        What :func:`restore_quantized` needs to undo it exactly.
    """
    attributes = {
        name: layer.__dict__.pop(name) for name in _QUANTIZED_ATTRIBUTES if name in layer.__dict__
    }
    mixins, base, origin = key = class_key(layer)
    undo = QuantizedBackup(layer._parameters["weight"], attributes, key)
    if issubclass(origin, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
        origin = nn.Linear
    others = tuple(mixin for mixin in mixins if not issubclass(mixin, QuantizedLayer))
    layer.__class__ = class_for_key((others, origin, origin))
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return undo


def restore_quantized(layer: nn.Module, undo: QuantizedBackup) -> None:
    """Puts a quantized weight back, bit for bit, on the device where the layer is now."""
    device = stored_parameter(layer, "weight").device
    four_bit = any(issubclass(mixin, FourBitLayer) for mixin in undo.key[0])
    weight: Any = as_params4bit(undo.weight) if four_bit else undo.weight
    layer._parameters["weight"] = weight.to(device)
    layer.__class__ = class_for_key(undo.key)
    layer.__dict__.update(undo.attributes)


def requantize(layer: Any, weight: Tensor) -> Tensor:
    """Returns what ``weight`` becomes when it is quantized again the way ``layer`` is.

    Only for 4-bit layers; the merge report uses it to say what re-quantizing would cost.
    """
    state = layer._parameters["weight"].quant_state
    packed, new_state = quantize_4bit(
        as_rows(layer, weight).contiguous(),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
    )
    return from_rows(layer, dequantize_4bit(packed, new_state))
