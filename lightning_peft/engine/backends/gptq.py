"""Weights of GPTQ, AWQ and AutoRound: 2 to 8 bits in words of 32.

Formats after gptqmodel's ``PackableQuantLinear`` and ``packing_utils``, and the ``QuantLinear`` of
auto-round. GPTQ packs along the inputs, AWQ along the outputs, and 4-bit AWQ in an order of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoRoundConfig, AwqConfig, GPTQConfig

from lightning_peft.engine.backends.loaded import (
    LoadedFormat,
    LoadedLinear,
    LoadedParameter,
    LoadedWeight,
    scaled,
    unpacked,
)
from lightning_peft.errors import UnsupportedError

# Where the numbers of eight outputs lie in a word of 4-bit AWQ.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class GptqLayer(LoadedLinear):
    """A linear layer whose weight GPTQ quantized."""

    label = "Gptq"


class AwqLayer(LoadedLinear):
    """A linear layer whose weight AWQ quantized."""

    label = "Awq"


class AutoRoundLayer(LoadedLinear):
    """A linear layer whose weight AutoRound quantized."""

    label = "AutoRound"


class Gptq(LoadedFormat):
    """Weights of ``GPTQConfig``."""

    name = "gptq"
    config_type: ClassVar[type] = GPTQConfig
    layer_class: ClassVar[type[Any]] = GptqLayer
    bits = 4

    # Of layers whose tensors are in the layout of files, which other kernels change.
    kinds: ClassVar[tuple[str, ...]] = ("gptqmodel.nn_modules.qlinear.torch.TorchLinear",)
    remedy: ClassVar[str] = "Load it with `GPTQConfig(bits=..., backend='gptq_torch')`"
    packed_along_inputs: ClassVar[bool] = True

    def claims(self, layer: nn.Module) -> bool:
        ours = type(layer).__module__.startswith("gptqmodel.nn_modules.qlinear.")
        return ours and "awq" not in type(layer).__module__

    def read(self, layer: Any) -> LoadedWeight:
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        if kind not in self.kinds:
            raise UnsupportedError(
                f"a {kind} lays its weight out for the kernels of one device. {self.remedy}"
            )
        if getattr(layer, "planar", False) or layer.qweight.dtype != torch.int32:
            raise UnsupportedError(
                f"a {type(layer).__name__} of {layer.bits} bits in planes or in words of other "
                "sizes than 32 bits, which gptqmodel alone reads. Save the base in 2, 4 or 8 bits"
            )
        groups, out = layer.scales.shape
        columns = layer.qweight.shape[0]
        if self.packed_along_inputs:
            columns = columns * 32 // layer.bits
        size = columns if layer.group_size == -1 else layer.group_size
        tensors = {"qzeros": layer.qzeros, "scales": layer.scales}
        order = getattr(layer, "g_idx", None)
        in_order = torch.arange(columns, device=layer.qweight.device) // size
        if self.packed_along_inputs and order is not None and not order.equal(in_order.int()):
            tensors["g_idx"] = order
        # Zeros of files of GPTQ's first version are one too small; gptqmodel has corrected its own.
        added = int(type(layer).__module__.endswith("_zp"))
        settings = {"bits": layer.bits, "group_size": size, "added": added}
        return LoadedWeight(layer.qweight, (out, columns), layer.scales.dtype, tensors, settings)

    def unpack(
        self, codes: Tensor, tensors: Mapping[str, Tensor], stored: LoadedParameter
    ) -> Tensor:
        settings, (out, columns) = stored.settings, stored.dense_shape
        if self.packed_along_inputs:
            values = _numbers(codes.t(), settings, columns)
        else:
            values = _in_order(_numbers(codes, settings, out), settings).t()
        zeros = _numbers(tensors["qzeros"], settings, out)
        if not self.packed_along_inputs:
            zeros = _in_order(zeros, settings)
        zeros = zeros.t().float() + settings["added"]
        scales, order = tensors["scales"].t(), tensors.get("g_idx")
        if order is None:
            return scaled(values, scales, zeros, (1, settings["group_size"]))
        order = order.long()
        return (values - zeros[:, order]) * scales.float()[:, order]


class Awq(Gptq):
    """Weights of ``AwqConfig``."""

    name = "awq"
    config_type = AwqConfig
    layer_class = AwqLayer
    kinds = ("gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear",)
    remedy = "Load it with `AwqConfig(backend='torch_awq')`"
    packed_along_inputs = False

    def claims(self, layer: nn.Module) -> bool:
        module = type(layer).__module__
        return module.startswith("gptqmodel.nn_modules.qlinear.") and "awq" in module


class AutoRound(Gptq):
    """Weights of ``AutoRoundConfig`` in auto-round's own layers."""

    name = "auto-round"
    config_type = AutoRoundConfig
    layer_class = AutoRoundLayer
    kinds = (
        "auto_round_extension.torch.qlinear_torch.QuantLinear",
        "auto_round_extension.torch.qlinear_torch_zp.QuantLinear",
    )
    remedy = "Load it with `AutoRoundConfig(backend='torch')`"

    def claims(self, layer: nn.Module) -> bool:
        return type(layer).__module__.startswith("auto_round_extension.")

    def lay_out(self, model: Any, settings: Any) -> None:
        raise UnsupportedError(
            "auto-round chooses its layers while it reads the files, so that a plan by name cannot "
            "know them. Load the base and plan the module: plan_memory(module)"
        )


def _numbers(words: Tensor, settings: Mapping[str, Any], columns: int) -> Tensor:
    return unpacked(words.contiguous().view(torch.uint8), settings["bits"], columns)


def _in_order(values: Tensor, settings: Mapping[str, Any]) -> Tensor:
    if settings["bits"] != 4:
        return values
    return values.unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].flatten(1)


GPTQ, AWQ, AUTO_ROUND = Gptq(), Awq(), AutoRound()
