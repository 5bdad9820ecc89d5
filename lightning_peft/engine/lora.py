"""Low-rank adapters that live on the adapted layer itself.

``h = W x + s B A x`` with ``A: r x in``, ``B: out x r`` and ``s = alpha / r`` (or
``alpha / sqrt(r)`` for rank-stabilised LoRA), after Hu et al. 2021 (arXiv 2106.09685) and
Kalajdzievski 2023 (arXiv 2312.03732). PEFT creates and initialises ``A`` and ``B``; names and
shapes are PEFT's, so that its files fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_peft.engine.in_place import InPlace, extend, parameter, retract
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

    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_adapters: dict[str, Adapter]
    lora_active: tuple[str, ...]
    lora_enabled: bool
    lora_merged: tuple[str, ...]
    lora_unmerged_weight: QuantizedWeight | None

    def running(self) -> list[str]:
        """Returns the adapters that this layer adds to its output now."""
        active = [name for name in self.lora_active if name in self.lora_adapters]
        return [n for n in active if n not in self.lora_merged] if self.lora_enabled else []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's own output plus ``s B A dropout(input)`` of each running adapter.

        The adapters' master weights stay in their own dtype (float32); the two products are
        computed in the dtype of the input, or in autocast's.

        Args:
            *args: What the layer takes; the first is the input of shape ``(..., in)``.
            **kwargs: The same by name.
        """
        with self.own_forward():
            result: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        for name in self.running():
            x = self.lora_dropout[name](args[0] if args else next(iter(kwargs.values())))
            low = F.linear(x, self.lora_A[name].weight.to(x.dtype))
            low = low * self.lora_adapters[name].scaling
            high = F.linear(low, self.lora_B[name].weight.to(low.dtype))
            result = result + high.to(result.dtype)
        return result

    def weight_is_stored(self) -> bool:
        """Says whether neither quantization nor an adapter changes what the weight does."""
        return super().weight_is_stored() and not self.running()

    def effective_weight(self) -> Tensor:
        """Returns ``W + s B A`` of the running adapters, with gradients to ``A`` and ``B``.

        Without dropout: that acts on inputs, and there are none here.
        """
        weight = super().effective_weight()
        total = weight.to(wide_dtype(weight))
        for name in self.running():
            total = total + self._product(name)
        return total.to(weight.dtype)

    def lora_delta(self, name: str) -> Tensor:
        """Returns ``s B A`` of one adapter, in the layout of the layer's weight."""
        return self._product(name).detach()

    def _product(self, name: str) -> Tensor:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a, b = a.to(wide_dtype(a)), b.to(wide_dtype(b))
        delta: Tensor = (b @ a) * self.lora_adapters[name].scaling
        return delta.t() if isinstance(self, Conv1D) else delta


@contextmanager
def without_adapters(layer: Any) -> Iterator[None]:
    """Within the body, the layer computes as if it had no adapter."""
    outer, layer.lora_enabled = layer.lora_enabled, False
    try:
        yield
    finally:
        layer.lora_enabled = outer


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype to add weights and adapters in: float32, or float64 where they are."""
    return torch.promote_types(tensor.dtype, torch.float32)


def attach(layer: Any, made_by_peft: Any, name: str) -> None:
    """Moves one adapter from a PEFT layer, created around ``layer``, onto ``layer`` itself.

    Half-precision adapters become float32: they are the master weights of the optimizer.

    Args:
        layer: The layer to adapt; it keeps its identity, attributes and parameter names.
        made_by_peft: PEFT's ``lora.Linear`` around ``layer``; it is not used afterwards.
        name: The adapter's name.
    """
    if not isinstance(layer, LoraLayer):
        extend(layer, LoraLayer)
        # New modules are in train mode; the layer may be inside a part that is in eval mode.
        layer.lora_A = nn.ModuleDict().train(layer.training)
        layer.lora_B = nn.ModuleDict().train(layer.training)
        layer.lora_dropout = nn.ModuleDict().train(layer.training)
        layer.lora_adapters = {}
        layer.lora_active, layer.lora_merged, layer.lora_enabled = (name,), (), True
        layer.lora_unmerged_weight = None
    device = parameter(layer, "weight").device
    for kind in ("lora_A", "lora_B", "lora_dropout"):
        module = getattr(made_by_peft, kind)[name].to(device).train(layer.training)
        for param in module.parameters():
            if param.dtype in (torch.float16, torch.bfloat16):
                param.data = param.data.float()
        getattr(layer, kind)[name] = module
    layer.lora_adapters[name] = Adapter(
        r=int(made_by_peft.r[name]),
        alpha=float(made_by_peft.lora_alpha[name]),
        scaling=float(made_by_peft.scaling[name]),
    )


def low_rank_factors(part: nn.Module, targets: Iterable[str], name: str) -> dict[str, Tensor]:
    """Returns ``A`` and ``B`` of one adapter on the layers ``targets``, by PEFT's keys in files."""
    factors: dict[str, Tensor] = {}
    for target in targets:
        layer: Any = part.get_submodule(target)
        factors[f"{target}.lora_A.weight"] = layer.lora_A[name].weight
        factors[f"{target}.lora_B.weight"] = layer.lora_B[name].weight
    return factors


def detach(layer: Any) -> None:
    """Removes all adapters from ``layer`` and gives it back the class it had before."""
    retract(layer, LoraLayer)
    for attribute in LoraLayer.__annotations__:
        delattr(layer, attribute)
