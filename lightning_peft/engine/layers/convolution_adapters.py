"""Corrections of PEFT's adapters for convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import nn
from torch.nn.utils import skip_init

from lightning_peft.engine.layers.kinds import standard_class


def bare_convolution(layer: Any) -> nn.Module:
    """Returns a plain convolution with the geometry of ``layer``, and without values.

    PEFT calls the class of the layer with its own arguments to make ``A`` and ``B``, which a
    subclass may not take. No random numbers are drawn.
    """
    return skip_init(
        standard_class(layer),
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        # Only its shape matters here; names such as "same" do not go with a stride.
        padding=0,
        groups=layer.groups,
        bias=False,
    )


class TransposedFactors(nn.Module):
    """An adapter for a transposed convolution, which PEFT has none for; initialised as PEFT does.

    ``A`` is ``(in, r, *kernel)`` and ``B`` is ``(out, r, 1, ...)``.
    """

    def __init__(
        self, layer: Any, name: str, config: LoraConfig, chosen: Mapping[str, Any]
    ) -> None:
        super().__init__()
        rank, alpha = chosen["r"], chosen["lora_alpha"]
        pointwise = getattr(nn, standard_class(layer).__name__.replace("Transpose", ""))
        a = skip_init(standard_class(layer), layer.in_channels, rank, layer.kernel_size, bias=False)
        b = skip_init(pointwise, rank, layer.out_channels, 1, bias=False)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a.weight, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(b.weight, a=math.sqrt(5))
        else:
            nn.init.zeros_(b.weight)
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A = nn.ModuleDict({name: a})
        self.lora_B = nn.ModuleDict({name: b})
        self.lora_dropout = nn.ModuleDict({name: dropout})
        self.r, self.lora_alpha = {name: rank}, {name: alpha}
        root = math.sqrt(rank) if config.use_rslora else rank
        self.scaling = {name: alpha / root}
