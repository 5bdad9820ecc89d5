"""DoRA, after Liu et al. 2024 (arXiv 2402.09353): LoRA with ``use_dora=True``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lightning_peft.engine.layers.dora import (
    MAGNITUDE,
    DoraConvolution,
    DoraEmbedding,
    DoraLayer,
    DoraLinear,
)
from lightning_peft.engine.layers.kinds import CONVOLUTIONS, LINEAR_LIKE, TRANSPOSED, as_rows
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.methods.lora import LORA, Lora


class Dora(Lora):
    """DoRA in place on linear layers, convolutions and embeddings."""

    reads_base = True

    def is_in_place(self, config: Any) -> bool:
        return type(config) is LoraConfig and not config.lora_bias

    def limits_rows(self, config: Any) -> bool:
        return False

    def takes_experts(self, config: Any) -> bool:
        return False

    def layer_class(self, layer: nn.Module) -> type[DoraLayer] | None:
        if isinstance(layer, CONVOLUTIONS):
            return DoraConvolution
        if isinstance(layer, nn.Embedding):
            return DoraEmbedding
        return DoraLinear if isinstance(layer, LINEAR_LIKE) else None

    def unsupported_reason(
        self, layer: nn.Module, name: str, config: Any, in_place: bool
    ) -> str | None:
        if isinstance(layer, TRANSPOSED):
            return "DoRA has no form on transposed convolutions. Leave it out, or use plain LoRA"
        reason = super().unsupported_reason(layer, name, config, in_place)
        return reason or _zeros_problem(layer)

    def create(
        self,
        original: Callable[[nn.Module], nn.Module],
        layer: nn.Module,
        name: str,
        config: Any,
        options: Mapping[str, Any],
    ) -> Any:
        made = super().create(original, layer, name, config, options)
        vector = getattr(made, MAGNITUDE)[name].weight
        setattr(made, MAGNITUDE, nn.ParameterDict({name: vector}))
        return made

    def for_plain_base(
        self, tensors: dict[str, Tensor], config: dict[str, Any], initial: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        # The direction is that of the same sum, and the magnitude is what it was.
        factors = {key: first for key, first in initial.items() if not key.endswith(MAGNITUDE)}
        return super().for_plain_base(tensors, config, factors)

    def label(self, fields: Mapping[str, Any]) -> str:
        return f"DoRA r={fields['r']} alpha={fields['lora_alpha']:g}"


def _zeros_problem(layer: Any) -> str | None:
    """Why a weight has no direction; ``None`` also where it has no numbers yet, or codes."""
    weight = None if "weight" not in layer._parameters else stored_parameter(layer)
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return None
    rows = weight.t() if isinstance(layer, nn.Embedding) else as_rows(layer, weight)
    count = int((torch.count_nonzero(rows.detach(), 1) == 0).sum())
    if not count:
        return None
    return (
        f"{count} of {len(rows)} outputs have weights of zero, which have no direction: DoRA "
        "divides by their norm, and would never train them. Leave the layer out by "
        "`exclude_modules`, or use plain LoRA"
    )


DORA = Dora(
    LORA.peft_type,
    hides_model_type=True,
    ignored_properties=LORA.ignored_properties,
    decisive_fields=LORA.decisive_fields,
)
