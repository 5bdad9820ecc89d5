"""compressed-tensors' weights: packed integers of 1 to 8 bits, int8 and float8.

Formats after ``compressed_tensors.compressors``: ``pack_quantized`` and ``naive_quantized``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompressedTensorsConfig

from lightning_peft.engine.backends.loaded import (
    LoadedFormat,
    LoadedLinear,
    LoadedParameter,
    LoadedWeight,
    scaled,
    unpacked,
)
from lightning_peft.errors import UnsupportedError

_DENSE = "`CompressedTensorsConfig(dequantize=True)` loads it dense"
# Strategies of activations, and whether each row has a scale.
_BY_ROW = {"token": True, "tensor": False}


class CompressedLayer(LoadedLinear):
    """A linear layer whose weight compressed-tensors holds."""

    label = "Compressed"


class CompressedTensors(LoadedFormat):
    """Weights of ``CompressedTensorsConfig``."""

    name = "compressed-tensors"
    config_type = CompressedTensorsConfig
    layer_class = CompressedLayer
    bits = 8
    library_attributes = ("quantization_scheme", "quantization_status", "quantization_enabled")

    def claims(self, layer: nn.Module) -> bool:
        return getattr(layer.__dict__.get("quantization_scheme"), "weights", None) is not None

    def read(self, layer: Any) -> LoadedWeight:
        held = {**layer._buffers, **layer._parameters}
        scheme = layer.quantization_scheme
        weights = scheme.weights
        packed, plain = held.get("weight_packed"), held.get("weight")
        codes = plain if packed is None else packed
        if not isinstance(layer, nn.Linear) or codes is None:
            raise UnsupportedError(f"a {type(layer).__name__} of compressed-tensors. {_DENSE}")
        if packed is None and codes.dtype.itemsize > 1:
            raise UnsupportedError(
                "compressed-tensors holds the weight dense and rounds it in each forward pass. "
                f"{_DENSE}"
            )
        inputs, outputs = scheme.input_activations, scheme.output_activations
        if outputs or (inputs and not (inputs.num_bits == 8 and inputs.strategy in _BY_ROW)):
            raise UnsupportedError(
                "compressed-tensors rounds the outputs of the layer, or its inputs in groups or in "
                f"fewer than 8 bits. {_DENSE}"
            )
        known = packed is None or str(packed.dtype) == "torch.int32"
        if not known or "weight_scale" not in held or held.get("weight_global_scale") is not None:
            raise UnsupportedError(
                f"compressed-tensors' {scheme.format} has scales of scales. {_DENSE}"
            )
        shape = (layer.out_features, layer.in_features)
        names = {
            "scale": "weight_scale",
            "zero_point": "weight_zero_point",
            "order": "weight_g_idx",
        }
        tensors = {name: held[key] for name, key in names.items() if held.get(key) is not None}
        if weights.symmetric:
            tensors.pop("zero_point", None)
        structure = getattr(weights, "block_structure", None)
        settings = {
            "values": str(codes.dtype).removeprefix("torch."),
            "bits": weights.num_bits if packed is not None else None,
            "block": None if structure is None else list(structure),
        }
        if inputs:
            kinds = {"int": "int8", "float": "float8_e4m3fn"}
            by_row, symmetric = _BY_ROW[inputs.strategy], bool(inputs.symmetric)
            values = kinds[inputs.type]
            settings["input"] = {"values": values, "symmetric": symmetric, "by_row": by_row}
            fixed = () if inputs.dynamic else ("input_scale", "input_zero_point")
            tensors |= {name: held[name] for name in fixed if held.get(name) is not None}
        if codes.is_floating_point():
            codes = codes.view(torch.uint8)
        return LoadedWeight(codes, shape, tensors["scale"].dtype, tensors, settings)

    def forget(self, module: nn.Module) -> None:
        for model in module.modules():
            hook = vars(model).get("ct_decompress_hook")
            # It makes layers dense before the first forward pass, and replaces their `forward`.
            if hook is not None and not any(self.claims(layer) for layer in model.modules()):
                hook.remove()
                del vars(model)["ct_decompress_hook"]

    def unpack(
        self, codes: Tensor, tensors: Mapping[str, Tensor], stored: LoadedParameter
    ) -> Tensor:
        bits, block = stored.settings["bits"], stored.settings["block"]
        scale, zeros = tensors["scale"], tensors.get("zero_point")
        if bits is None:
            values = codes.view(getattr(torch, stored.settings["values"]))
        else:
            values = _signed(codes, bits, stored.dense_shape[1])
            if zeros is not None and zeros.dtype == torch.int32:
                # Packed along the rows.
                zeros = _signed(zeros.t().contiguous(), bits, scale.shape[0]).t()
        order = tensors.get("order")
        if order is not None and bool((order >= 0).all()):
            chosen = scale[:, order.long()].float()
            shift = 0 if zeros is None else zeros[:, order.long()].float()
            return (values.float() - shift) * chosen
        return scaled(values, scale, zeros, None if block is None else tuple(block))


def _signed(words: Tensor, bits: int, columns: int) -> Tensor:
    """Numbers packed with an offset of half their range, as int32 words of a bit stream."""
    return unpacked(words.view(torch.uint8), bits, columns).to(torch.int16) - (1 << bits - 1)


COMPRESSED_TENSORS = CompressedTensors()
