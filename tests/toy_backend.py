"""A third quantization backend: symmetric int8 with a scale per row. Nothing else knows of it.

``docs/contributing.md`` walks through it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import engine
from lightning_peft.engine.backends.base import QuantizationBackend
from lightning_peft.engine.backends.layers import QuantizedConvolution, QuantizedLinear
from lightning_peft.errors import ConfigError


@dataclass
class ToyConfig:
    """Settings of the backend.

    Attributes:
        levels: Values on each side of zero; at most 127.
        skip_modules: Names of modules that stay dense.
    """

    levels: int = 127
    skip_modules: list[str] = field(default_factory=list)


class ToyParameter(nn.Parameter):
    """int8 values with their scales; a copy keeps them."""

    scales: Tensor
    levels: int
    dense_dtype: torch.dtype

    def __new__(cls, codes: Tensor, scales: Tensor, levels: int, dtype: torch.dtype):
        stored = torch.Tensor._make_subclass(cls, codes, False)
        stored.scales, stored.levels, stored.dense_dtype = scales, levels, dtype
        return stored

    def __deepcopy__(self, memo: dict[int, Any]) -> ToyParameter:
        copied = ToyParameter(
            self.data.clone(), copy.deepcopy(self.scales, memo), self.levels, self.dense_dtype
        )
        memo[id(self)] = copied
        return copied


class ToyLayer(QuantizedLinear):
    label = "Toy"


class ToyConvolution(QuantizedConvolution):
    label = "Toy"


class ToyBackend(QuantizationBackend[ToyConfig]):
    name = "toy_int8"
    config_type = ToyConfig
    layer_class = ToyLayer
    convolution_class = ToyConvolution
    bits = 8

    def check_config(self, config: ToyConfig) -> None:
        if not 0 < config.levels < 128:
            raise ConfigError(f"levels={config.levels}: from 1 to 127.")

    def config_to_dict(self, config: ToyConfig) -> dict[str, Any]:
        skipped = {"skip_modules": config.skip_modules} if config.skip_modules else {}
        return {"levels": config.levels, **skipped}

    def config_from_dict(self, fields: Mapping[str, Any]) -> ToyConfig:
        try:
            return ToyConfig(**fields)
        except TypeError as error:
            raise ConfigError(f"ToyConfig: {error}") from error

    def label(self, fields: Mapping[str, Any]) -> str:
        return f"toy int8, {fields['levels']} levels"

    def quantize(self, rows: Tensor, config: ToyConfig, device: torch.device) -> ToyParameter:
        rows = rows.detach()
        scales = rows.float().abs().amax(1).clamp(min=1e-12) / config.levels
        codes = (rows.float() / scales[:, None]).round().to(torch.int8)
        return ToyParameter(codes.to(device), scales.to(device), config.levels, rows.dtype)

    def meta(self, rows: Tensor, config: ToyConfig) -> Any:
        stored: Any = nn.Parameter(rows.new_empty(rows.shape, dtype=torch.int8), False)
        stored.scales = rows.new_empty(rows.shape[0], dtype=torch.float32)
        stored.levels, stored.dense_dtype = config.levels, rows.dtype
        return stored

    def requantize(self, stored: Any, rows: Tensor) -> Tensor:
        again = self.quantize(rows, ToyConfig(stored.levels), rows.device)
        return self.dequantize(again)

    def dequantize(self, stored: Any, dtype: torch.dtype | None = None) -> Tensor:
        rows = stored.data.float() * stored.scales.to(stored.device)[:, None]
        return rows.to(dtype or stored.dense_dtype)

    def owns(self, stored: Any) -> bool:
        return isinstance(getattr(stored, "levels", None), int)

    def weight_info(self, stored: Any) -> tuple[torch.Size, torch.dtype]:
        return stored.shape, stored.dense_dtype

    def constants(self, stored: Any) -> list[Tensor]:
        return [stored.scales]

    def state_tensors(self, stored: Any) -> dict[str, Tensor]:
        # The dtype from before, for which a tensor without elements is enough.
        dtype = torch.empty(0, dtype=stored.dense_dtype)
        levels = torch.tensor(stored.levels)
        return {"codes": stored.data, "scales": stored.scales, "levels": levels, "dtype": dtype}

    def from_state_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
        codes, scales = tensors["codes"].to(device), tensors["scales"].to(device)
        return ToyParameter(codes, scales, int(tensors["levels"]), tensors["dtype"].dtype)

    def restore(self, stored: Any, device: torch.device) -> ToyParameter:
        if isinstance(stored, ToyParameter) and stored.device == device:
            return stored
        scales = stored.scales.to(device)
        return ToyParameter(stored.data.to(device), scales, stored.levels, stored.dense_dtype)

    def map_tensors(self, stored: Any, function: Callable[[Tensor], Tensor]) -> Any:
        copied: Any = nn.Parameter(function(stored), requires_grad=False)
        copied.scales, copied.levels = function(stored.scales), stored.levels
        copied.dense_dtype = stored.dense_dtype
        return copied

    def stored_bytes(self, parameters: int, config: ToyConfig) -> int:
        return parameters


TOY = ToyBackend()
engine.register_backend(TOY)
