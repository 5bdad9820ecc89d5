"""torchao's tensors: int8, float8, 1 to 8 bits in int8, and int4 in its plain layout.

Formats after the docstrings of ``torchao.quantization.quantize_.workflows``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from lightning_peft.engine.backends.loaded import (
    LoadedFormat,
    LoadedLinear,
    LoadedParameter,
    LoadedWeight,
    scaled,
    unpacked,
)
from lightning_peft.errors import UnsupportedError

# Classes whose `qdata` has one value per element.
_PLAIN = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
_INT4 = "Int4Tensor"


class TorchAoLayer(LoadedLinear):
    """A linear layer whose weight torchao quantized."""

    label = "TorchAo"


class TorchAo(LoadedFormat):
    """Weights of ``TorchAoConfig``."""

    name = "torchao"
    config_type = TorchAoConfig
    layer_class = TorchAoLayer
    bits = 8
    library_attributes = ("_hf_quantized_needs_local_tp", "extra_repr")

    def claims(self, layer: nn.Module) -> bool:
        kind = type(layer._parameters.get("weight"))
        return kind.__module__.partition(".")[0] == "torchao"

    def read(self, layer: Any) -> LoadedWeight:
        weight = layer._parameters["weight"]
        kind = type(weight).__name__
        if not isinstance(layer, nn.Linear) or weight.ndim != 2:
            raise UnsupportedError(
                f"a {type(layer).__name__} in torchao's {kind}: linear layers are served. Name it "
                "in `modules_to_not_convert` of the TorchAoConfig"
            )
        if kind not in (*_PLAIN, _INT4):
            raise UnsupportedError(
                f"torchao's {kind} is laid out for the kernels of one device. Save the base with "
                "`int4_packing_format='plain'`, or in int8 or float8"
            )
        others = ("act_pre_scale", "act_quant_scale", "reduce_range")
        eight = getattr(weight, "activation_dtype", torch.bfloat16) != torch.bfloat16
        if eight or any(getattr(weight, name, None) not in (None, False) for name in others):
            raise UnsupportedError(
                f"torchao's {kind} changes the inputs of the layer by fixed scales, or in fewer "
                "bits. Save the base by a weight-only config"
            )
        codes, shape = weight.qdata, tuple(weight.shape)
        tensors = {"scale": weight.scale}
        zeros = getattr(weight, "zero_point", None)
        if zeros is not None:
            tensors["zero_point"] = zeros
        settings: dict[str, Any] = {
            "layout": kind,
            "values": str(codes.dtype).removeprefix("torch."),
        }
        settings["input"] = _input_kind(weight)
        if codes.is_floating_point():
            codes = codes.view(torch.uint8)
        return LoadedWeight(codes, shape, weight.dtype, tensors, settings)

    def lay_out(self, model: Any, settings: Any) -> None:
        library = import_module("torchao.quantization")
        quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.preprocess_model(model)
        kind = quantizer.quantization_config.get_apply_tensor_subclass()
        for name, layer in model.named_modules():
            if quantizer.param_needs_quantization(model, f"{name}.weight"):
                library.quantize_(layer, kind)

    def unpack(
        self, codes: Tensor, tensors: Mapping[str, Tensor], stored: LoadedParameter
    ) -> Tensor:
        scale, zeros = tensors["scale"], tensors.get("zero_point")
        if stored.settings["layout"] == _INT4:
            # Two's complement; the zeros are weights.
            nibbles = unpacked(codes.view(torch.uint8), 4, stored.dense_shape[1])
            signed = (nibbles.view(torch.int8) ^ 8) - 8
            return scaled(signed, scale.t(), added=tensors["zero_point"].t())
        return scaled(codes.view(getattr(torch, stored.settings["values"])), scale, zeros)


def _input_kind(weight: Any) -> dict[str, Any] | None:
    """How inputs are rounded, for :func:`rounded_input`; ``None`` where they are not."""
    if getattr(weight, "activation_quantization", None) is not None:
        # `int8_asym_per_token`, the only one.
        return {"values": "int8", "symmetric": False, "by_row": True}
    given = getattr(weight, "act_quant_kwargs", None)
    if given is None:
        return None
    dtype = getattr(given, "float8_dtype", torch.int8)
    symmetric = getattr(getattr(given, "mapping_type", None), "name", "SYMMETRIC") == "SYMMETRIC"
    by_row = type(given.granularity).__name__ == "PerRow"
    return {"values": str(dtype).removeprefix("torch."), "symmetric": symmetric, "by_row": by_row}


TORCHAO = TorchAo()
