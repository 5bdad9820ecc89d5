"""LoRA on the weights of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``.

Such a layer keeps matrices for each of its layers and directions, and gives all of them to one
kernel. Here each has ``A`` and ``B`` of its own, and the kernel gets ``W + s B A``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lightning_peft.compat.torch import StoredFlatWeights, flat_weights
from lightning_peft.engine.layers.adapter import AdapterLayer, accumulation_dtype
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.engine.layers.mixin import require_whole

_MATRIX = re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?")


def matrices(layer: Any) -> dict[str, nn.Parameter]:
    """Returns the stored matrices of a recurrent layer by name."""
    held: Mapping[str, Any] = layer._parameters
    return {name: param for name, param in held.items() if _MATRIX.fullmatch(name)}


def stores_weight(layer: Any) -> bool:
    """Whether a layer keeps its weight, or all of its matrices, as parameters.

    Others compute it from parameters of other names (weight norm, parametrizations).
    """
    if isinstance(layer, nn.MultiheadAttention):
        return layer._parameters.get("in_proj_weight") is not None
    if not isinstance(layer, nn.RNNBase):
        return "weight" in layer._parameters
    directions = 2 if layer.bidirectional else 1
    return len(matrices(layer)) == layer.num_layers * directions * (3 if layer.proj_size else 2)


class RecurrentFactors(nn.Module):
    """An adapter for a recurrent layer, which PEFT lacks; made by PEFT, a matrix at a time."""

    def __init__(self, layer: Any, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        made: dict[str, Any] = {}
        for key, weight in matrices(layer).items():
            device = "meta" if weight.is_meta else "cpu"
            rows, columns = weight.shape
            made[key] = make(skip_init(nn.Linear, columns, rows, bias=False, device=device))
        first = next(iter(made.values()))
        self.r, self.lora_alpha, self.scaling = first.r, first.lora_alpha, first.scaling
        self.lora_dropout = first.lora_dropout
        for kind in LoraLayer.adapter_layer_names:
            factors = {key: getattr(one, kind)[name] for key, one in made.items()}
            setattr(self, kind, nn.ModuleDict({name: nn.ModuleDict(factors)}))


class LoraRecurrent(LoraLayer, StoredFlatWeights):
    """A recurrent layer: ``A`` is ``(r, in)`` and ``B`` is ``(out, r)`` for each matrix.

    What is called *the* weight is all matrices one after the other, flat. Dropout in front of the
    adapters has no place: the kernel makes the inputs of all layers but the first.
    """

    weight_name = ""

    def __getattr__(self, name: str) -> Any:
        # Reached for parameters: code that reads a matrix gets that with the adapter in it.
        value = super().__getattr__(name)  # type: ignore[misc]
        if not _MATRIX.fullmatch(name) or self.weight_is_stored():
            return value
        return self._split(self.effective_weight())[name]

    def weight_is_stored(self) -> bool:
        """Whether reading a matrix means the stored one."""
        return bool(self.__dict__.get("in_own_forward")) or super().weight_is_stored()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns output and states of the class, with the running adapters in the matrices."""
        changed = {}
        if self.effective_adapters():
            changed = self._split(LoraRecurrent.effective_weight(self))
        with flat_weights(self, changed):
            return super(AdapterLayer, self).forward(*args, **kwargs)  # type: ignore[misc]

    def factors_of(self, name: str, matrix: str) -> tuple[Tensor, Tensor]:
        """Returns ``A`` and ``B`` of one adapter for one matrix."""
        a, b = (getattr(self, kind)[name][matrix].weight for kind in self.adapter_layer_names)
        return a, b

    def effective_weight(self) -> Tensor:
        """Returns all matrices with the running adapters in them, flat, with gradients to these."""
        stored = list(matrices(self).values())
        for one in stored:
            require_whole(one)
        weight = torch.cat([one.flatten() for one in stored])
        total = weight.to(accumulation_dtype(weight))
        for name in self.effective_adapters():
            total = total + self.delta_weight(name)
        return total.to(weight.dtype)

    def delta_weight(self, name: str, weight: Tensor | None = None) -> Tensor:
        """Returns ``s B A`` of all matrices, flat."""
        pieces = []
        for matrix in matrices(self):
            a, b = (x.to(accumulation_dtype(x)) for x in self.factors_of(name, matrix))
            pieces.append((b @ (a * self.adapter_settings[name].scaling)).flatten())
        return torch.cat(pieces)

    def store_weight(self, weight: Tensor) -> None:
        """Writes new values into all matrices, from a flat tensor."""
        stored = matrices(self)
        for name, values in self._split(weight).items():
            stored[name].copy_(values)

    def has_no_effect(self) -> bool:
        """Whether every adapter on the layer still adds nothing."""
        pairs = (self.factors_of(n, m) for n in self.adapter_settings for m in matrices(self))
        return all(not a.any() or not b.any() for a, b in pairs)

    def _split(self, weight: Tensor) -> dict[str, Tensor]:
        stored = matrices(self)
        pieces = weight.split([one.numel() for one in stored.values()])
        return {
            name: piece.view(one.shape)
            for (name, one), piece in zip(stored.items(), pieces, strict=True)
        }
