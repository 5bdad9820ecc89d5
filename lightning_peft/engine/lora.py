"""Low-rank adapters that live on the adapted layer itself.

``h = W x + s B A x`` with ``A: r x in``, ``B: out x r`` and ``s = alpha / r`` (or
``alpha / sqrt(r)`` for rank-stabilised LoRA), after Hu et al. 2021 (arXiv 2106.09685) and
Kalajdzievski 2023 (arXiv 2312.03732). PEFT creates and initialises ``A`` and ``B``; names and
shapes are PEFT's, so that its files fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_peft.engine.in_place import InPlace, extend, retract
from lightning_peft.engine.quantization import QuantizedWeight


@dataclass
class Adapter:
    """What one adapter on one layer is, besides its tensors.

    Attributes:
        r: Rank.
        alpha: PEFT's ``lora_alpha``.
        scaling: The factor in front of ``B A``.
    """

    r: int
    alpha: float
    scaling: float


class LoraLayer(InPlace):
    """A dense or quantized layer that adds the active adapters to its own output.

    Attributes:
        lora_A: ``nn.ModuleDict`` of ``nn.Linear(in, r, bias=False)`` by adapter name.
        lora_B: ``nn.ModuleDict`` of ``nn.Linear(r, out, bias=False)`` by adapter name.
        lora_dropout: ``nn.ModuleDict`` of dropouts in front of ``A``.
        lora_adapters: Rank and scaling by adapter name.
        lora_active: Names of the adapters that take part in ``forward``.
        lora_enabled: ``False`` inside :func:`lightning_peft.disable_adapters`.
        lora_merged: Names of the adapters that are folded into the weight.
        lora_unmerged_weight: The quantized weight that merging replaced.
    """

    label = "Lora"

    weight: Tensor
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_adapters: dict[str, Adapter]
    lora_active: tuple[str, ...]
    lora_enabled: bool
    lora_merged: tuple[str, ...]
    lora_unmerged_weight: QuantizedWeight | None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's own output plus ``s B A dropout(input)`` of each active adapter.

        The adapters' master weights stay in their own dtype (float32); the two products are
        computed in the dtype of ``input``, or in autocast's.
        """
        result: Tensor = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        if not self.lora_enabled:
            return result
        for name in self.lora_active:
            if name in self.lora_adapters and name not in self.lora_merged:
                x = self.lora_dropout[name](input)
                low = F.linear(x, self.lora_A[name].weight.to(x.dtype))
                low = low * self.lora_adapters[name].scaling
                high = F.linear(low, self.lora_B[name].weight.to(low.dtype))
                result = result + high.to(result.dtype)
        return result

    def lora_delta(self, name: str) -> Tensor:
        """Returns ``s B A`` of one adapter in float32, in the layout of the layer's weight."""
        a = self.lora_A[name].weight.detach().float()
        b = self.lora_B[name].weight.detach().float()
        delta = (b @ a) * self.lora_adapters[name].scaling
        return delta.t() if isinstance(self, Conv1D) else delta


def attach(layer: nn.Module, made_by_peft: nn.Module, name: str) -> None:
    """Moves one adapter from a PEFT layer, created around ``layer``, onto ``layer`` itself.

    Half-precision adapters become float32: they are the master weights of the optimizer.

    Args:
        layer: The layer to adapt; it keeps its identity, attributes and parameter names.
        made_by_peft: PEFT's ``lora.Linear`` around ``layer``; it is not used afterwards.
        name: The adapter's name.
    """
    if not isinstance(layer, LoraLayer):
        extend(layer, LoraLayer)
        layer.lora_A, layer.lora_B = nn.ModuleDict(), nn.ModuleDict()
        layer.lora_dropout = nn.ModuleDict()
        layer.lora_adapters = {}
        layer.lora_active, layer.lora_merged, layer.lora_enabled = (name,), (), True
        layer.lora_unmerged_weight = None
        # New modules are in train mode; the layer may be inside a part that is in eval mode.
        for child in (layer.lora_A, layer.lora_B, layer.lora_dropout):
            child.train(layer.training)
    assert isinstance(layer, LoraLayer)
    device = layer.weight.device
    for part in ("lora_A", "lora_B", "lora_dropout"):
        module = getattr(made_by_peft, part)[name].to(device).train(layer.training)
        for param in module.parameters():
            if param.dtype in (torch.float16, torch.bfloat16):
                param.data = param.data.float()
        getattr(layer, part)[name] = module
    layer.lora_adapters[name] = Adapter(
        r=int(made_by_peft.r[name]),  # type: ignore[index]
        alpha=float(made_by_peft.lora_alpha[name]),  # type: ignore[index]
        scaling=float(made_by_peft.scaling[name]),  # type: ignore[index]
    )


def detach(layer: LoraLayer) -> None:
    """Removes all adapters from ``layer`` and gives it back the class it had before."""
    assert isinstance(layer, nn.Module)
    retract(layer, LoraLayer)
    for attribute in LoraLayer.__annotations__:
        if attribute.startswith("lora_"):
            delattr(layer, attribute)
