"""LoRA on expert weights, applied only to the routed rows."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.engine.layers.adapter import accumulation_dtype
from lightning_peft.engine.layers.expert_weights import ExpertMixin
from lightning_peft.engine.layers.lora import LoraLayer

# Kernels for grouped products take rows of a multiple of 16 bytes.
_ALIGNED = 8


class LoraExperts(LoraLayer, ExpertMixin):
    """``A`` is ``(experts * r, in)`` and ``B`` is ``(out, r * experts)``, as PEFT has them.

    Expert ``e`` has rows ``e * r`` to ``e * r + r`` of ``A``, and columns ``e``, ``experts + e``,
    ``2 * experts + e``, ... of ``B``. No weight with the adapter in it is made for a product.
    """

    num_experts: int

    def stacked(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns ``A`` as ``(experts, r, in)`` and ``B`` as ``(experts, out, r)``; views."""
        a, b = self.factors(name)
        rank = self.adapter_settings[name].r
        rows = a.view(self.num_experts, rank, a.shape[1])
        return rows, b.view(b.shape[0], rank, self.num_experts).permute(2, 0, 1)

    def _of_expert(self, name: str, index: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of one expert in a forward pass of all, which takes them apart once.

        The gradient of a slice is as large as all experts, and there would be one for each.
        """
        kept: dict[Any, Any] | None = self.__dict__.get("kept_factors")
        if kept is None:
            a, b = self.stacked(name)
            return a[index].to(dtype), b[index].to(dtype)
        key = name, dtype
        if key not in kept:
            kept[key] = [factor.to(dtype).unbind() for factor in self.stacked(name)]
        a, b = kept[key]
        return a[int(index)], b[int(index)]

    def added_product(self, rows: Tensor, index: Any) -> Tensor | None:
        """Returns the sum of what the adapters add for rows ``(n, in)`` of one expert."""
        added = []
        for name in self.effective_adapters():
            a, b = self._of_expert(name, index, rows.dtype)
            low = F.linear(rows, a) * self.adapter_settings[name].scaling
            added.append(F.linear(low, b.to(low.dtype)))
        return _sum(added)

    def added_batched(self, rows: Tensor, index: Tensor) -> Tensor | None:
        """Returns the same for rows ``(n, 1, in)`` of an expert each."""
        added = []
        for name in self.effective_adapters():
            a, b = (factor[index].to(rows.dtype) for factor in self.stacked(name))
            low = torch.bmm(rows, a.transpose(-2, -1)) * self.adapter_settings[name].scaling
            added.append(torch.bmm(low, b.to(low.dtype).transpose(-2, -1)))
        return _sum(added)

    def added_stacked(self, rows: Tensor) -> Tensor | None:
        """Returns the same for rows ``(experts, n, in)`` and weights stored ``(in, out)``."""
        added = []
        for name in self.effective_adapters():
            first, last = (factor.to(rows.dtype) for factor in reversed(self.stacked(name)))
            if self.is_transposed:
                first, last = last.transpose(-2, -1), first.transpose(-2, -1)
            low = torch.bmm(rows, first) * self.adapter_settings[name].scaling
            added.append(torch.bmm(low, last))
        return _sum(added)

    def added_grouped(self, function: Any, rows: Tensor, *rest: Any, **named: Any) -> Tensor | None:
        """Returns the same for rows ``(n, in)`` sorted by expert, as two grouped products."""
        added = []
        for name in self.effective_adapters():
            a, b = (factor.to(rows.dtype).transpose(-2, -1) for factor in self.stacked(name))
            missing = -a.shape[-1] % _ALIGNED
            a = F.pad(a, (0, missing)).contiguous()
            b = F.pad(b, (0, 0, 0, missing)).contiguous()
            low = function(rows, a, *rest, **named) * self.adapter_settings[name].scaling
            added.append(function(low, b, *rest, **named))
        return _sum(added)

    def effective_expert(self, index: Any) -> Tensor:
        """Returns the weight of the experts ``index`` with the running adapters in it."""
        weight = super().effective_expert(index)
        total = weight.to(accumulation_dtype(weight))
        for name in self.effective_adapters():
            total = total + self._delta(name, index)
        return total.to(weight.dtype)

    def _delta(self, name: str, index: Any) -> Tensor:
        a, b = (f[index].to(accumulation_dtype(f)) for f in self.stacked(name))
        delta = (b @ a) * self.adapter_settings[name].scaling
        return delta.transpose(-2, -1) if self.is_transposed else delta

    def delta_weight(self, name: str, weight: Tensor | None = None) -> Tensor:
        """Returns ``s B A`` of all experts, in the layout of the parameter."""
        return self._delta(name, slice(None))


def _sum(added: list[Tensor]) -> Tensor | None:
    return reduce(torch.add, added) if added else None
