"""bitsandbytes' 8-bit type, LLM.int8, after Dettmers et al. 2022 (arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lightning_peft.compat.bitsandbytes import save_linear8bit
from lightning_peft.engine.backends import bnb_config
from lightning_peft.engine.backends.base import QuantizationBackend
from lightning_peft.engine.backends.bnb_config import BitsAndBytesBackend
from lightning_peft.engine.backends.layers import QuantizedLinear
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, has_quantizable_class
from lightning_peft.engine.layers.mixin import add_mixin


class EightBitLayer(QuantizedLinear):
    """A linear layer whose weight is int8 with one scale per row.

    Attributes:
        state: bitsandbytes' ``MatmulLtState``, filled from the weight in every forward pass.
        dense_dtype: Dtype of the weight before quantization.
    """

    label = "EightBit"

    state: Any
    dense_dtype: torch.dtype

    def weight_info(self) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype from before quantization."""
        return self._parameters["weight"].shape, self.dense_dtype

    def effective_weight(self) -> Tensor:
        """The dequantized weight in the dtype from before quantization."""
        return self.backend.dequantize(self._parameters["weight"], self.dense_dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # bitsandbytes' own: it has the key of the format, without which it loads nothing.
        save_linear8bit(self, destination, prefix, keep_vars)

    def load_weight(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Takes codes and scales out of what :meth:`state_dict` gave."""
        self._load_codes({"codes": state[f"{prefix}weight"], "SCB": state[f"{prefix}SCB"]})


class EightBit(BitsAndBytesBackend):
    """int8 values with a float32 scale per row."""

    layer_class = EightBitLayer
    module_classes = (bnb.nn.Linear8bitLt,)
    layer_attributes = ("compute_dtype", "state", "index", "dense_dtype")
    fuses_adapters = False
    leaves_freed_memory = True
    quantizes_on_load = False
    bits = 8

    def accepts(self, config: BitsAndBytesConfig) -> bool:
        return bool(config.load_in_8bit)

    def config_to_dict(self, config: BitsAndBytesConfig) -> dict[str, Any]:
        return bnb_config.to_dict(config, "load_in_8bit", "llm_int8_threshold")

    def label(self, fields: Mapping[str, Any]) -> str:
        return "int8"

    def unsupported_reason(self, layer: nn.Module) -> str | None:
        if not has_quantizable_class(layer):
            return super().unsupported_reason(layer)
        if isinstance(layer, CONVOLUTION_LIKE):
            return (
                f"it is a {type(layer).__name__}, and bitsandbytes has 8-bit products for linear "
                "layers only. Use `load_in_4bit=True`, or LoRAStrategy"
            )
        if isinstance(layer, Conv1D):
            return (
                "transformers' Conv1D (GPT-2 and relatives) stores its weight transposed, which "
                "8-bit layers cannot. Use `load_in_4bit=True`, or LoRAStrategy"
            )
        return super().unsupported_reason(layer)

    def base_class(self, layer: nn.Module) -> type[nn.Module]:
        return bnb.nn.Linear8bitLt

    def prepare(self, layer: Any, config: BitsAndBytesConfig, dtype: torch.dtype) -> None:
        super().prepare(layer, config, dtype)
        # What the constructor of ``Linear8bitLt`` makes, which a layer without values cannot call.
        layer.state = bnb.MatmulLtState()
        layer.state.threshold = config.llm_int8_threshold
        layer.state.has_fp16_weights, layer.state.use_pool = False, True
        layer.index, layer.dense_dtype = None, dtype

    def adopt(self, layer: Any) -> None:
        weight, state = layer.weight, layer.state
        quantized = weight.dtype == torch.int8 and not state.has_fp16_weights
        bnb_config.require_codes(layer, quantized)
        # After the first forward pass, bitsandbytes keeps the scales in the state only.
        weight.SCB = weight.SCB if weight.SCB is not None else state.SCB
        weight.CB = None
        add_mixin(layer, EightBitLayer)
        layer.compute_dtype = None
        layer.dense_dtype = torch.float16 if layer.bias is None else layer.bias.dtype

    def quantize(self, rows: Tensor, config: BitsAndBytesConfig, device: torch.device) -> Any:
        # Moved while dense: bitsandbytes quantizes on the way from the CPU only.
        dense: Any = bnb.nn.Int8Params(rows.cpu(), requires_grad=False, has_fp16_weights=False)
        stored = dense.to(device)
        stored.CB = None
        return stored

    def nearest(self, stored: Any, rows: Tensor) -> Tensor:
        scales = stored.SCB.to(stored.device).float().unsqueeze(1) / 127.0
        codes = (rows.float() / scales.where(scales != 0, 1)).round_().clamp_(-127, 127)
        return codes.to(torch.int8)

    def dequantize(self, stored: Any, dtype: torch.dtype | None = None) -> Tensor:
        scales = stored.SCB.to(stored.device).float() / 127.0
        rows = stored.data.float() * scales.unsqueeze(1)
        return rows.to(dtype or self.weight_info(stored)[1])

    def matmul(self, layer: Any, input: Tensor, stored: Any, bias: Tensor | None) -> Tensor:
        # Not bitsandbytes' own product: it rounds activations to int8 on GPUs and not on CPUs, goes
        # through float16 there, waits for the device in each layer, and keeps its inputs where
        # checkpointing cannot free them.
        # The weight moves with the module; the scales, and what bitsandbytes' layer reads once this
        # is not one of ours any more, do not.
        stored.SCB = stored.SCB.to(stored.device)
        layer.state.CB, layer.state.SCB = stored.data, stored.SCB
        return super().matmul(layer, input, stored, bias)

    def weight_to_multiply(self, stored: Any, dtype: torch.dtype) -> Tensor:
        return stored.data.to(dtype).mul_(stored.SCB.mul(1 / 127).unsqueeze(1))

    def owns(self, stored: Any) -> bool:
        return getattr(stored, "SCB", None) is not None

    def weight_info(self, stored: Any) -> tuple[torch.Size, torch.dtype]:
        # bitsandbytes' parameter keeps no dtype when it is copied or moved, so the layer does.
        return stored.shape, torch.float16

    def constants(self, stored: Any) -> list[Tensor]:
        return [stored.SCB]

    def state_tensors(self, stored: Any) -> dict[str, Tensor]:
        return {"codes": stored.data, "SCB": stored.SCB}

    def from_state_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
        return _parameter(tensors["codes"].to(device), tensors["SCB"].to(device))

    def restore(self, stored: Any, device: torch.device) -> Any:
        if not isinstance(stored, bnb.nn.Int8Params):
            stored = _parameter(stored.data, stored.SCB)
        if stored.device != device:
            stored = stored.to(device)
            stored.CB = None
        return stored

    def meta(self, rows: Tensor, config: BitsAndBytesConfig) -> Any:
        stored: Any = nn.Parameter(rows.new_empty(rows.shape, dtype=torch.int8), False)
        stored.SCB = rows.new_empty(rows.shape[0], dtype=torch.float32)
        return stored

    def map_tensors(self, stored: Any, function: Callable[[Tensor], Tensor]) -> Any:
        copied: Any = nn.Parameter(function(stored), requires_grad=False)
        copied.SCB = function(stored.SCB)
        return copied

    def stored_bytes(self, parameters: int, config: BitsAndBytesConfig) -> int:
        # The scales depend on the shape; for rows of 1024 they are 0.4 %.
        return parameters


def _parameter(codes: Tensor, scales: Tensor) -> Any:
    stored: Any = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    stored.SCB, stored.CB = scales, None
    return stored


EIGHT_BIT: QuantizationBackend[BitsAndBytesConfig] = EightBit()
