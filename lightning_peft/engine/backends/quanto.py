"""optimum-quanto's weights: int8, float8, and int4 and int2 in groups.

Formats after ``optimum.quanto.tensor``: ``qbytes.py``, ``qbits.py``, ``packed.py``, ``grouped.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import QuantoConfig

from lightning_peft.engine.backends.loaded import (
    LoadedFormat,
    LoadedLinear,
    LoadedParameter,
    LoadedWeight,
    scaled,
)
from lightning_peft.errors import UnsupportedError

# Others hold the codes as the kernels of one GPU take them.
_CLASSES = ("WeightQBytesTensor", "WeightQBitsTensor")


class QuantoLayer(LoadedLinear):
    """A linear layer whose weight quanto quantized."""

    label = "Quanto"


class Quanto(LoadedFormat):
    """Weights of ``QuantoConfig``."""

    name = "quanto"
    config_type = QuantoConfig
    layer_class = QuantoLayer
    bits = 8
    library_attributes = (
        "weight_qtype",
        "weight_group_size",
        "activation_qtype",
        "optimizer",
        "_quantize_hooks",
    )

    def claims(self, layer: nn.Module) -> bool:
        return any(c.__module__.startswith("optimum.quanto.") for c in type(layer).__mro__)

    def read(self, layer: Any) -> LoadedWeight:
        weight = layer._parameters.get("weight")
        kind = type(weight).__name__
        if not isinstance(layer, nn.Linear):
            raise UnsupportedError(
                f"quanto's {type(layer).__name__}: linear layers are served. Name it in "
                "`modules_to_not_convert` of the QuantoConfig"
            )
        if kind not in _CLASSES or weight._axis != 0:
            raise UnsupportedError(
                f"quanto's {type(layer).__name__} holds a {kind}, and not codes in quanto's plain "
                "layout. Load it on a CPU with `QuantoConfig(weights=...)`"
            )
        if layer.activation_qtype is not None:
            raise UnsupportedError(
                f"quanto's {type(layer).__name__} rounds activations too. Load it with "
                "`activations=None`"
            )
        codes, shape = weight._data, tuple(weight.shape)
        settings = {"values": str(codes.dtype).removeprefix("torch."), "bits": weight._qtype.bits}
        tensors = {"scale": weight._scale}
        if kind == _CLASSES[1]:
            tensors["shift"] = weight._shift
            settings["groups"] = codes.shape[0] // shape[0]
            codes = codes._data
        elif codes.is_floating_point():
            codes = codes.view(torch.uint8)
        return LoadedWeight(codes, shape, weight.dtype, tensors, settings)

    def unpack(
        self, codes: Tensor, tensors: Mapping[str, Tensor], stored: LoadedParameter
    ) -> Tensor:
        rows, columns = stored.dense_shape
        shift, bits = tensors.get("shift"), stored.settings["bits"]
        if shift is None:
            return scaled(codes.view(getattr(torch, stored.settings["values"])), tensors["scale"])
        # The first rows of groups lie in the lowest bits of all bytes, the next ones above.
        parts = [(codes >> start) & ((1 << bits) - 1) for start in range(0, 8, bits)]
        groups = rows * stored.settings["groups"]
        values = torch.cat(parts)[:groups]
        if shift.is_floating_point():
            dense = scaled(values, tensors["scale"], added=-shift)
        else:
            dense = scaled(values, tensors["scale"], shift)
        return dense.reshape(rows, columns)


QUANTO = Quanto()
