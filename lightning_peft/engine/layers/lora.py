"""In-place LoRA layers.

``h = W x + s B A x`` with ``A: r x in``, ``B: out x r`` and ``s = alpha / r`` (or
``alpha / sqrt(r)`` for rank-stabilised LoRA), after Hu et al. 2021 (arXiv 2106.09685) and
Kalajdzievski 2023 (arXiv 2312.03732). PEFT creates and initialises ``A`` and ``B``; names and
shapes are PEFT's, so that its files fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.engine.layers.adapter import AdapterLayer, accumulation_dtype
from lightning_peft.engine.layers.convolution import convolve, mix_channels
from lightning_peft.engine.layers.embedding import EmbeddingLookup
from lightning_peft.engine.layers.fused import fused_output
from lightning_peft.engine.layers.kinds import TRANSPOSED, from_rows
from lightning_peft.errors import UnsupportedError


@dataclass
class LoraSettings:
    """What one adapter on one layer is, besides its tensors.

    Attributes:
        r: Rank.
        alpha: PEFT's ``lora_alpha``.
        scaling: The factor in front of ``B A``.
        rows: The rows of the output that the adapter adds to, as ranges in ascending order; empty
            where it adds to all.
    """

    r: int
    alpha: float
    scaling: float
    rows: tuple[tuple[int, int], ...] = ()


def only_rows(matrix: Tensor, rows: tuple[tuple[int, int], ...]) -> Tensor:
    """Returns ``matrix`` with zeros, which take no gradient, outside of the ranges ``rows``."""
    pieces, end = [], 0
    for first, last in rows:
        pieces += [matrix.new_zeros(first - end, *matrix.shape[1:]), matrix[first:last]]
        end = last
    return torch.cat([*pieces, matrix.new_zeros(len(matrix) - end, *matrix.shape[1:])])


class LoraLayer(AdapterLayer):
    """A layer that adds ``s B A`` of its adapters; one subclass per kind of layer.

    Attributes:
        lora_A: ``nn.ModuleDict`` of the layers to rank ``r``, by adapter name.
        lora_B: ``nn.ModuleDict`` of the layers from rank ``r``, by adapter name.
        lora_dropout: ``nn.ModuleDict`` of dropouts in front of ``A``.
    """

    label = "Lora"
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    adapter_module_names = ("lora_dropout",)

    adapter_settings: dict[str, LoraSettings]
    lora_dropout: Any

    @classmethod
    def settings_of(cls, peft_layer: Any, name: str) -> LoraSettings:
        """Rank and scaling of one adapter."""
        return LoraSettings(
            r=int(peft_layer.r[name]),
            alpha=float(peft_layer.lora_alpha[name]),
            scaling=float(peft_layer.scaling[name]),
        )

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns ``A`` and ``B`` of one adapter."""
        a, b = (getattr(self, kind)[name] for kind in self.adapter_layer_names[:2])
        rows = self.adapter_settings[name].rows
        return a.weight, only_rows(b.weight, rows) if rows else b.weight

    def limit_rows(self, name: str, rows: tuple[tuple[int, int], ...]) -> None:
        """Lets one adapter add to ``rows`` only: the others of ``B`` are zeros and stay so."""
        self.adapter_settings[name].rows = rows
        self.clear_other_rows()

    @torch.no_grad()
    def clear_other_rows(self) -> None:
        """Writes zeros into the rows of each ``B`` that its adapter does not add to."""
        for name, settings in self.adapter_settings.items():
            if settings.rows:
                b = getattr(self, self.adapter_layer_names[1])[name].weight
                b.copy_(only_rows(b, settings.rows))

    def adapted_forward(self, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's own output plus what each adapter adds to it.

        The adapters' master weights stay in their own dtype (float32); the two products are
        computed in the dtype of the input, or in autocast's.
        """
        result = self.base_forward(*args, **kwargs)
        for name in names:
            x = self.lora_dropout[name](args[0] if args else next(iter(kwargs.values())))
            added = self.adapter_output(name, x, *args[1:], **kwargs)
            result = result + added.to(result.dtype)
        return result

    def adapter_output(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the contribution of one adapter to the output for ``x``, after dropout."""
        raise NotImplementedError

    def upcast_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns ``s A`` and ``B`` in a dtype to multiply them in."""
        a, b = (factor.to(accumulation_dtype(factor)) for factor in self.factors(name))
        return a * self.adapter_settings[name].scaling, b

    def has_no_effect(self) -> bool:
        """Whether every adapter on the layer still adds nothing."""
        return all(
            not a.any() or not b.any() for a, b in (self.factors(n) for n in self.adapter_settings)
        )


class LoraLinear(LoraLayer):
    """``nn.Linear`` or ``Conv1D``: ``A`` is ``(r, in)`` and ``B`` is ``(out, r)``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``W x + s B A x`` for ``x`` of shape ``(..., in)``, in one step where it can."""
        fused = fused_output(self, self.effective_adapters(), args, kwargs)
        return super().forward(*args, **kwargs) if fused is None else fused

    def adapter_output(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``s B A x`` for ``x`` of shape ``(..., in)``."""
        a, b = self.factors(name)
        low = F.linear(x, a.to(x.dtype)) * self.adapter_settings[name].scaling
        return F.linear(low, b.to(low.dtype))

    def delta_weight(self, name: str, weight: Tensor | None = None) -> Tensor:
        """Returns ``s B A``."""
        a, b = self.upcast_factors(name)
        return from_rows(self, b @ a)


class LoraConvolution(LoraLayer):
    """A convolution: ``A`` has its kernel and ``r`` channels, ``B`` mixes them to ``out``.

    In PEFT's shapes ``A`` sees all input channels, also where the layer is grouped: what the
    adapter adds is then no grouped kernel, and cannot be merged.
    """

    groups: int

    def adapter_output(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``s B (A * x)`` for ``x`` of shape ``(N, in, *size)``."""
        a, b = self.factors(name)
        size = args[0] if args else kwargs.get("output_size")
        low = convolve(self, x, a.to(x.dtype), size) * self.adapter_settings[name].scaling
        return mix_channels(low, b.to(low.dtype), self.groups)

    def delta_weight(self, name: str, weight: Tensor | None = None) -> Tensor:
        """Returns ``s B A`` as a kernel."""
        if self.groups > 1:
            raise UnsupportedError(
                "An adapter on a grouped convolution adds to all its input channels, so there is "
                "no weight that has it built in: it cannot be merged, nor read as `weight`. Call "
                "the layer, or leave it out by `exclude_modules`."
            )
        a, b = self.upcast_factors(name)
        if isinstance(self, TRANSPOSED):
            return torch.einsum("ir...,or->io...", a, b.flatten(1))
        return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])


class LoraEmbedding(EmbeddingLookup, LoraLayer):
    """``nn.Embedding``: ``A`` is ``(r, tokens)`` and starts at zero, ``B`` is ``(width, r)``.

    Rows that are looked up are those of ``W`` plus those of ``A^T`` times ``B^T``.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_embedding_A", "lora_embedding_B")

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns ``A`` and ``B`` of one adapter."""
        a, b = (getattr(self, kind)[name] for kind in self.adapter_layer_names[:2])
        return a, b

    def look_up(self, input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``F.embedding`` of the effective weight, without making that weight."""
        rows = F.embedding(input, self._parameters["weight"], *args, **kwargs)
        # Padding rows get no gradient, as in the layer's own weight.
        padding = kwargs.get("padding_idx", args[0] if args else None)
        return self.rows_with_adapters(rows, self.effective_adapters(), input, padding)

    def rows_with_adapters(
        self, rows: Tensor, names: Sequence[str], ids: Tensor, padding: int | None
    ) -> Tensor:
        """Returns the rows of the table that were looked up, with the adapters in them."""
        for name in names:
            rows = rows + self.low_rank_rows(name, ids, padding).to(rows.dtype)
        return rows

    def low_rank_rows(self, name: str, ids: Tensor, padding: int | None) -> Tensor:
        """Returns those rows of ``s (B A)^T``."""
        a, b = self.factors(name)
        low = F.embedding(ids, a.t(), padding)
        return (low @ b.t()) * self.adapter_settings[name].scaling

    def delta_weight(self, name: str, weight: Tensor | None = None) -> Tensor:
        """Returns ``s (B A)^T`` of shape ``(tokens, width)``."""
        a, b = self.upcast_factors(name)
        return (b @ a).t()
