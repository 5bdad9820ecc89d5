"""AQLM's weights: sums of vectors from codebooks, after Egiazarian et al. 2024 (arXiv 2401.06118).

Format after ``aqlm.inference.QuantizedLinear`` and ``aqlm.utils``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AqlmConfig

from lightning_peft.engine.backends.loaded import (
    LoadedFormat,
    LoadedLinear,
    LoadedParameter,
    LoadedWeight,
)


class AqlmLayer(LoadedLinear):
    """A linear layer whose weight AQLM quantized."""

    label = "Aqlm"


class Aqlm(LoadedFormat):
    """Weights of ``AqlmConfig``."""

    name = "aqlm"
    config_type = AqlmConfig
    layer_class = AqlmLayer
    bits = 2

    def claims(self, layer: nn.Module) -> bool:
        return type(layer).__module__ == "aqlm.inference"

    def read(self, layer: Any) -> LoadedWeight:
        codes = layer.codes
        # The first forward pass on a CPU turns codes of one byte around, and leaves no other sign.
        if layer.gemv_op is not None and layer.codebook_size == 256 and not codes.is_cuda:
            codes = codes.permute(1, 0, 2).contiguous()
        tensors = {"codebooks": layer.codebooks, "scales": layer.scales}
        shape = (layer.out_features, layer.in_features)
        return LoadedWeight(codes, shape, layer.codebooks.dtype, tensors)

    def unpack(
        self, codes: Tensor, tensors: Mapping[str, Tensor], stored: LoadedParameter
    ) -> Tensor:
        books = tensors["codebooks"].float()
        # Signed numbers stand for unsigned ones.
        places = codes.long() % books.shape[1]
        vectors = sum(book[places[..., number]] for number, book in enumerate(books))
        # Blocks `(out, in)` of blocks of outputs and inputs.
        blocks: Tensor = vectors * tensors["scales"].float()
        return blocks.transpose(1, 2).reshape(stored.dense_shape)


AQLM = Aqlm()
