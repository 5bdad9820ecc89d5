"""(IA)^3 in place, after Liu et al. 2022 (arXiv 2205.05638). Nothing else knows of it.

``docs/contributing.md`` walks through it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.methods.base import InPlaceMethod


class ScaledLinear(AdapterLayer):
    """``W (l * x)`` or ``l * (W x)`` with a trained ``l``; no bias."""

    label = "Scaled"
    adapter_layer_names = ("ia3_l",)

    ia3_l: nn.ParameterDict

    @classmethod
    def settings_of(cls, peft_layer: Any, name: str) -> bool:
        return bool(peft_layer.is_feedforward)

    def adapted_forward(self, names: list[str], input: Tensor) -> Tensor:
        inputs = [name for name in names if self.adapter_settings[name]]
        for name in inputs:
            input = input * self.ia3_l[name].flatten().to(input.dtype)
        output = self.base_forward(input)
        for name in names:
            if name not in inputs:
                output = output * self.ia3_l[name].flatten().to(output.dtype)
        return output

    def delta_weight(self, name: str, weight: Tensor) -> Tensor:
        return weight * (self.ia3_l[name].to(weight.dtype) - 1)

    def restored_weight(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        return weight / math.prod(self.ia3_l[name].to(weight.dtype) for name in names)

    def has_no_effect(self) -> bool:
        return all((scale == 1).all() for scale in self.ia3_l.values())


class Scaling(InPlaceMethod):
    """Linear layers without a bias; PEFT's wrappers for others."""

    def layer_class(self, layer: nn.Module) -> type[AdapterLayer] | None:
        return ScaledLinear if isinstance(layer, nn.Linear) and layer.bias is None else None

    def label(self, fields: Mapping[str, Any]) -> str:
        return "(IA)^3"


SCALING = Scaling("IA3")
