"""Quantized expert weights, dequantized one expert at a time.

The weight is quantized as one matrix of ``experts * out`` rows (``experts * in`` where it is
transposed). A product dequantizes the weight of its expert for the forward pass and again for the
backward pass; in between only the codes exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.compat.torch import FakeTensor
from lightning_peft.engine.backends.layers import QuantizedLayer, output_dtype
from lightning_peft.engine.layers.expert_weights import ExpertMixin, parameter_name


class QuantizedExperts(ExpertMixin, QuantizedLayer):
    """Mixin for :class:`~lightning_peft.engine.layers.expert_weights.ExpertWeight`."""

    num_experts: int

    def one_expert(self, index: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dequantized weight of the experts ``index``: an integer, or some."""
        if isinstance(index, slice):
            return QuantizedExperts.effective_weight(self)[index]
        if isinstance(index, Tensor) and index.ndim:
            chosen, places = index.unique(return_inverse=True)
            return torch.stack([self.one_expert(one, dtype) for one in chosen])[places]
        size = self.weight_info()[0][1]
        first = int(index) % self.num_experts * size
        return self.backend.dequantize_rows(self.stored_weight(), first, first + size, dtype)

    def effective_weight(self) -> Tensor:
        """The dequantized weight of all experts, without adapters."""
        shape = self.weight_info()[0]
        rows = shape[0] * shape[1]
        return self.backend.dequantize_rows(self.stored_weight(), 0, rows).view(shape)

    def routed_product(
        self, function: Any, rows: Tensor, index: Any, *rest: Any, **named: Any
    ) -> Tensor:
        """The product of rows ``(n, in)`` with the weight of one expert, plus a bias if given."""
        ends = [0] * int(index) + [rows.shape[0]]
        result = self._products(rows, ends)
        biases = [one for one in (*rest, *named.values()) if one is not None]
        return result + biases[0].to(result.dtype) if biases else result

    def grouped_product(self, function: Any, rows: Tensor, *rest: Any, **named: Any) -> Tensor:
        """The products of rows, sorted by expert, each with the weight of its expert."""
        ends: Any = named.get("offs", rest[0] if rest else None)
        # Without values, as if one expert got all rows: what is held at once is the same.
        known = [rows.shape[0]] if isinstance(ends, FakeTensor) else ends.tolist()
        return self._products(rows, known)

    def stacked_product(self, rows: Tensor) -> Tensor:
        """The products of rows ``(experts, n, in)`` with weights stored ``(in, out)``."""
        experts, count = rows.shape[:2]
        ends = [count * number for number in range(1, experts + 1)]
        return self._products(rows.flatten(0, 1), ends, True).unflatten(0, (experts, count))

    def _products(self, rows: Tensor, ends: list[int], as_stored: bool | None = None) -> Tensor:
        kept = output_dtype(rows)
        rows = rows.to(self.compute_dtype or kept)
        stored = self.is_transposed if as_stored is None else as_stored
        product: Tensor = _ExpertProducts.apply(rows, self, ends, stored)
        return product.to(kept)

    def forward(self, rows: Tensor) -> Tensor:
        """Returns the product of rows ``(n, in)`` with the weight of the first expert."""
        return self.routed_product(None, rows, 0)

    def dense_output(self, input: Tensor) -> Tensor:
        """The same with the effective weight, in float32, by torch."""
        weight = self.effective_expert(0).float()
        return input.float() @ (weight if self.is_transposed else weight.t())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves the constants next to the codes, which are the experts' own parameter."""
        name = parameter_name(prefix.removesuffix("."))
        for key, value in self.constants_in_state().items():
            destination[f"{name}.{key}"] = value if keep_vars else value.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The experts put the codes back: they may have no attributes yet.
        super(QuantizedLayer, self).__setstate__(state)  # type: ignore[misc]


class _ExpertProducts(torch.autograd.Function):
    """Products of groups of rows with dequantized weights, of which one exists at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: Any, ends: list[int], as_stored: bool) -> Tensor:
        ctx.layer, ctx.ends, ctx.as_stored = layer, ends, as_stored
        width = layer.weight_info()[0][2 if as_stored else 1]
        return _by_expert(rows, layer, ends, width, as_stored)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        width = ctx.layer.weight_info()[0][1 if ctx.as_stored else 2]
        rows = _by_expert(gradient, ctx.layer, ctx.ends, width, not ctx.as_stored)
        return rows, None, None, None


def _by_expert(rows: Tensor, layer: Any, ends: list[int], width: int, as_stored: bool) -> Tensor:
    output = rows.new_zeros(rows.shape[0], width)
    start = 0
    for index, end in enumerate(ends):
        if end > start:
            weight = layer.one_expert(index, rows.dtype)
            torch.mm(rows[start:end], weight if as_stored else weight.t(), out=output[start:end])
            del weight
            start = end
    return output
