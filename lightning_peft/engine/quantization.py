"""Frozen weights in 4-bit (NF4 or FP4, optionally with double quantization) or 8-bit, in place.

The data types and kernels are bitsandbytes'; Dettmers et al. 2023 (arXiv 2305.14314) describe
NF4 and double quantization. A quantized layer stays the object that it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lightning_peft.engine.in_place import InPlace, extend
from lightning_peft.errors import UnsupportedError

QUANTIZABLE = (nn.Linear, Conv1D)


class FourBitLayer(InPlace):
    """A linear layer whose weight is a ``bitsandbytes.nn.Params4bit``.

    The forward pass never takes bitsandbytes' CPU repacking path: that path replaces the weight
    in place during the first evaluation and has no backward pass, so gradients through the layer
    would vanish from then on without an error.

    Attributes:
        weight: Packed ``uint8`` of shape ``(ceil(out * in / 2), 1)`` with a ``quant_state``.
        compute_dtype: Dtype of the matrix product; ``None`` follows the input or autocast.
    """

    label = "FourBit"

    weight: Any
    bias: Tensor | None
    compute_dtype: torch.dtype | None

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input @ dequantize(weight).T + bias`` with gradients to ``input``.

        Args:
            input: ``(..., in)`` of any floating dtype.
        """
        device_type = input.device.type
        autocast = torch.is_autocast_enabled(device_type)
        out_dtype = torch.get_autocast_dtype(device_type) if autocast else input.dtype
        dtype = self.compute_dtype or out_dtype
        # A cast copy: bitsandbytes' own layer casts the stored bias, which changes the base.
        bias = None if self.bias is None else self.bias.to(dtype)
        product = bnb.matmul_4bit(
            input.to(dtype), self.weight, bias=bias, quant_state=self.weight.quant_state
        )
        return product.to(out_dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)  # type: ignore[arg-type]
        for key, value in self.weight.quant_state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()


class EightBitLayer(InPlace):
    """A linear layer whose weight is int8 with one scale per row (LLM.int8, arXiv 2208.07339)."""

    label = "EightBit"


def is_quantized(layer: nn.Module) -> bool:
    """Says whether the weight of ``layer`` is stored by bitsandbytes in 4 or 8 bits."""
    return isinstance(layer, (FourBitLayer, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def quantize(
    layer: nn.Module, config: BitsAndBytesConfig, device: torch.device | None = None
) -> None:
    """Quantizes the weight of ``layer`` in place, on ``device``, and frees the dense weight.

    Args:
        layer: ``nn.Linear`` or transformers' ``Conv1D`` with a dense weight.
        config: 4-bit or 8-bit settings. ``bnb_4bit_compute_dtype`` holds for the product.
        device: Where the quantized weight ends up; ``None`` leaves it where it is.

    Raises:
        UnsupportedError: If the layer is of a kind that cannot be quantized right.
    """
    if type(layer) not in QUANTIZABLE:
        raise UnsupportedError(
            f"A layer of type {type(layer).__name__} cannot be quantized: only nn.Linear and "
            "transformers' Conv1D themselves can, since a subclass may read its weight directly. "
            "Name it in `llm_int8_skip_modules` of a BitsAndBytesConfig to keep it dense."
        )
    device = device or layer.weight.device
    if config.load_in_8bit:
        _to_8bit(layer, config, device)
    else:
        _to_4bit(layer, config, device)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(device)


def _to_4bit(layer: nn.Module, config: BitsAndBytesConfig, device: torch.device) -> None:
    dense = layer.weight.data
    layer._parameters.pop("weight")
    rows = dense.t() if isinstance(layer, Conv1D) else dense
    packed = bnb.nn.Params4bit(
        rows.contiguous(),
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
    ).to(device)
    if isinstance(layer, Conv1D):
        extend(layer, FourBitLayer)
    else:
        # bitsandbytes' own class below ours: PEFT's wrappers recognise quantized layers by it.
        extend(layer, FourBitLayer, base=bnb.nn.Linear4bit)
        _set_linear4bit_attributes(layer)
    layer.register_parameter("weight", packed)
    _weight_first(layer)
    layer.compute_dtype = config.bnb_4bit_compute_dtype


def _weight_first(layer: nn.Module) -> None:
    # Parameter order is part of every optimizer state that is saved by position.
    weight = layer._parameters.pop("weight")
    rest = dict(layer._parameters)
    layer._parameters.clear()
    layer._parameters.update({"weight": weight, **rest})


def _set_linear4bit_attributes(layer: nn.Module) -> None:
    layer.compute_type_is_set = True
    layer.quant_state = None
    layer.quant_storage = torch.uint8
    layer.support_avx512bf16_for_cpu = False


def _to_8bit(layer: nn.Module, config: BitsAndBytesConfig, device: torch.device) -> None:
    if isinstance(layer, Conv1D):
        raise UnsupportedError(
            "transformers' Conv1D layers (GPT-2 and relatives) cannot be quantized to 8 bits: "
            "their weight is stored transposed. Use `load_in_4bit=True`, or LoRAStrategy."
        )
    donor = bnb.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=config.llm_int8_threshold,
        device="meta",
    )
    dense = layer._parameters.pop("weight").data
    extend(layer, EightBitLayer, base=bnb.nn.Linear8bitLt)
    layer.state, layer.index = donor.state, None
    packed = bnb.nn.Int8Params(dense, requires_grad=False, has_fp16_weights=False).to(device)
    layer.register_parameter("weight", packed)
    _weight_first(layer)


def adopt_quantized(layer: nn.Module) -> None:
    """Gives a layer that bitsandbytes or ``from_pretrained`` quantized the safe forward pass."""
    if isinstance(layer, bnb.nn.Linear4bit) and not isinstance(layer, FourBitLayer):
        # Reading the state dict undoes bitsandbytes' CPU repacking, if it already happened.
        layer.state_dict()
        chosen = layer.compute_dtype if layer.compute_type_is_set else None
        extend(layer, FourBitLayer)
        _set_linear4bit_attributes(layer)
        layer.compute_dtype = chosen


def dense_weight(layer: nn.Module) -> Tensor:
    """Returns the weight of ``layer`` as a dense tensor in its own layout, dequantized if needed.

    4-bit weights come back in the dtype that they had before quantization, 8-bit in float32.
    """
    weight = layer.weight
    if isinstance(layer, (FourBitLayer, bnb.nn.Linear4bit)):
        rows = dequantize_4bit(weight.data, weight.quant_state)
        return rows.t() if isinstance(layer, Conv1D) else rows
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        codes = layer.state.CB if layer.state.CB is not None else weight.data
        return codes.float() * (scales.float() / 127.0).unsqueeze(1)
    return weight.detach()


@dataclass
class QuantizedWeight:
    """Everything that :func:`make_dense` takes off a layer, so that it can be put back."""

    weight: nn.Parameter
    attributes: dict[str, Any]
    layer_class: type[nn.Module]


_QUANTIZED_ATTRIBUTES = (
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
    "state",
    "index",
)


def make_dense(layer: nn.Module, weight: Tensor) -> QuantizedWeight:
    """Replaces the quantized weight of ``layer`` by a dense one; the layer's class goes back.

    Returns:
        What :func:`make_quantized` needs to undo it exactly.
    """
    cls = type(layer)
    assert issubclass(cls, InPlace)
    taken = {
        name: layer.__dict__.pop(name) for name in _QUANTIZED_ATTRIBUTES if name in layer.__dict__
    }
    undo = QuantizedWeight(layer._parameters.pop("weight"), taken, cls)  # type: ignore[arg-type]
    others = [m for m in cls.mixins if m not in (FourBitLayer, EightBitLayer)]
    layer.__class__ = cls.origin_class
    for mixin in reversed(others):
        extend(layer, mixin)
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    _weight_first(layer)
    return undo


def make_quantized(layer: nn.Module, undo: QuantizedWeight) -> None:
    """Puts a quantized weight back, bit for bit, on the device where the layer is now."""
    device = layer.weight.device
    layer._parameters.pop("weight")
    layer.__class__ = undo.layer_class
    layer.__dict__.update(undo.attributes)
    layer.register_parameter("weight", undo.weight.to(device))  # type: ignore[arg-type]
    _weight_first(layer)


def requantized(layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns what ``weight`` becomes when it is quantized again the way ``layer`` is.

    Only for 4-bit layers; the merge report uses it to say what re-quantizing would cost.
    """
    state = layer.weight.quant_state
    rows = weight.t().contiguous() if isinstance(layer, Conv1D) else weight.contiguous()
    packed, new_state = quantize_4bit(
        rows,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
    )
    again = dequantize_4bit(packed, new_state)
    return again.t() if isinstance(layer, Conv1D) else again


def storage_bytes(param: Tensor) -> int:
    """Returns the bytes that a parameter occupies, with the constants of its quantization."""
    total = param.numel() * param.element_size()
    state = getattr(param, "quant_state", None)
    if state is not None:
        total += state.absmax.numel() * state.absmax.element_size()
        if state.nested:
            inner = state.state2.absmax
            total += inner.numel() * inner.element_size()
    scales = getattr(param, "SCB", None)
    return total + (0 if scales is None else scales.numel() * scales.element_size())


def element_count(param: Tensor) -> int:
    """Returns how many weights a parameter stands for (4-bit packs two in a byte)."""
    state = getattr(param, "quant_state", None)
    return int(state.shape.numel()) if state is not None else param.numel()
