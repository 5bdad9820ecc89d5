"""HQQ's weights: 1 to 8 bits in groups along the inputs or across the outputs.

Format after ``hqq.core.quantize.Quantizer`` and ``hqq.core.bitpack.BitPack``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import HqqConfig

from lightning_peft.engine.backends.loaded import (
    LoadedFormat,
    LoadedLinear,
    LoadedParameter,
    LoadedWeight,
    scaled,
)
from lightning_peft.errors import UnsupportedError


class HqqLayer(LoadedLinear):
    """A linear layer whose weight HQQ quantized."""

    label = "Hqq"


class Hqq(LoadedFormat):
    """Weights of ``HqqConfig``, and of hqq's own ``AutoHQQHFModel``."""

    name = "hqq"
    config_type = HqqConfig
    layer_class = HqqLayer
    bits = 4

    def claims(self, layer: nn.Module) -> bool:
        return type(layer).__module__ == "hqq.core.quantize"

    def read(self, layer: Any) -> LoadedWeight:
        meta, codes = layer.meta, layer.W_q
        if meta is None or codes is None:
            raise UnsupportedError("hqq's layer has no weight yet. Quantize it or load its weight")
        if meta["quant_scale"] or meta["quant_zero"] or "zero_scale" in meta:
            raise UnsupportedError(
                "hqq quantized the scales or zeros of the layer too, which it has given up. Save "
                "the base with `quant_scale=False, quant_zero=False, offload_meta=False`"
            )
        if meta["view_as_float"]:
            codes = codes.view(meta["unpack_view_dtype"])
        settings = {name: meta[name] for name in ("packing", "axis", "group_size")}
        tensors = {"scale": meta["scale"], "zero": meta["zero"]}
        return LoadedWeight(codes, tuple(meta["shape"]), meta["compute_dtype"], tensors, settings)

    def unpack(
        self, codes: Tensor, tensors: Mapping[str, Tensor], stored: LoadedParameter
    ) -> Tensor:
        settings = stored.settings
        bits = int(settings["packing"][0])
        # Ten numbers of 3 bits in an int32; the first rows lie in the highest bits.
        places = range(10 if bits == 3 else 8 // bits)
        parts = [(codes >> bits * place) & ((1 << bits) - 1) for place in reversed(places)]
        size = settings["group_size"]
        rows = stored.dense_shape.numel() // size if settings["axis"] else size
        return scaled(torch.cat(parts)[:rows], tensors["scale"], tensors["zero"]).reshape(
            stored.dense_shape
        )


HQQ = Hqq()
