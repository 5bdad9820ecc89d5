"""DoRA, after Liu et al. 2024 (arXiv 2402.09353): LoRA on the direction of a weight.

``h = m / ||V|| V x`` with ``V = W + s B A``, where each output has its own norm and its own ``m``,
which trains and starts as the norm. The norm is a constant for autograd (section 4.3). PEFT makes
``V`` in each forward pass. Here the square of its norm is made of ``||W||^2``, ``W A^T`` and
``A A^T``, and the output of the products that LoRA has too. Dropout acts on what the norm is taken
off, as in PEFT: ``h = m / ||V|| V d + W (x - d)`` with ``d`` the input after dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lightning_peft.compat.torch import FakeTensor, version_of
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.layers.fused import fused_product
from lightning_peft.engine.layers.kinds import as_rows, from_rows
from lightning_peft.engine.layers.lora import (
    LoraConvolution,
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
    LoraSettings,
)
from lightning_peft.engine.layers.operation_contexts import without_autocast

MAGNITUDE = "lora_magnitude_vector"


@dataclass
class DoraSettings(LoraSettings):
    """The same for DoRA.

    Attributes:
        merged_factor: ``m / ||V||`` when the adapter was merged, ``(out, 1)``.
        base_norms: The norms of a quantized weight, with what tells that it is the same.
    """

    merged_factor: Tensor | None = None
    base_norms: tuple[Any, Tensor] | None = None


def row_norms(rows: Tensor, a: Tensor, b: Tensor, own: Tensor | None = None) -> Tensor:
    """Returns the norm of each row of ``rows + b @ a`` without that sum; not negative.

    Args:
        rows: ``(out, in)``.
        a: ``(r, in)``, in the dtype of the result.
        b: ``(out, r)``, in the dtype of the result.
        own: The norms of ``rows``, where they are known.
    """
    own = own_norms(rows, a.dtype) if own is None else own
    cross = (rows @ a.to(rows.dtype).t()).to(a.dtype)
    added = (b * (2 * cross + b @ (a @ a.t()))).sum(1)
    # Not zero, by which is divided.
    return (own.square() + added).clamp_min(torch.finfo(a.dtype).tiny).sqrt()


def own_norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the norm of each of ``rows`` in ``dtype``."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms


class DoraLayer(LoraLayer):
    """A layer with the magnitudes of its outputs apart; one subclass per kind of layer.

    Several adapters add up what each of them changes.

    Attributes:
        lora_magnitude_vector: ``nn.ParameterDict`` of ``m``, by adapter name, in PEFT's shapes.
        kept_factors: ``m / ||V||`` by adapter name, while adapters do not change.
    """

    label = "Dora"
    adapter_layer_names = (*LoraLayer.adapter_layer_names, MAGNITUDE)

    adapter_settings: dict[str, DoraSettings]  # type: ignore[assignment]
    lora_magnitude_vector: Any
    kept_factors: dict[str, Tensor] | None = None

    @classmethod
    def settings_of(cls, peft_layer: Any, name: str) -> DoraSettings:
        """Rank and scaling of one adapter."""
        return DoraSettings(**vars(super().settings_of(peft_layer, name)))

    @torch.no_grad()
    def start_adapter(self, name: str) -> None:
        """Sets ``m`` to the norms of what is there: of the quantized weight, and in full precision.

        PEFT rounds them to the dtype of the base.
        """
        magnitude = self.lora_magnitude_vector[name]
        if not magnitude.is_meta:
            magnitude.copy_(self.norms(name).view(magnitude.shape))

    def has_no_effect(self) -> bool:
        """Whether every adapter on the layer still adds nothing and has the norms as magnitudes."""
        # Outside of a forward pass a weight that is spread over processes has no norms.
        known = not self.is_sharded and super().has_no_effect()
        return known and all(
            torch.equal(self.norms(name), self.magnitude(name)) for name in self.adapter_settings
        )

    def outputs_as_rows(self, weight: Tensor) -> Tensor:
        """Returns ``weight`` as a matrix with a row for each magnitude; a view."""
        return as_rows(self, weight)  # type: ignore[arg-type]

    def rows_as_weight(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`outputs_as_rows`."""
        return from_rows(self, rows)

    def magnitude(self, name: str) -> Tensor:
        """Returns ``m`` of one adapter, ``(out,)``."""
        flat: Tensor = self.lora_magnitude_vector[name].flatten()
        return flat

    @torch.no_grad()
    def norms(self, name: str) -> Tensor:
        """Returns ``||V||`` for one adapter, ``(out,)``, in float32 or more."""
        a, b = self.upcast_factors(name)
        weight: Tensor = super(AdapterLayer, self).effective_weight()
        with without_autocast(weight):
            rows = self.outputs_as_rows(weight)
            return self.norms_of(rows, a, b, self._known_norms(name, rows, a.dtype))

    def norms_of(self, rows: Tensor, a: Tensor, b: Tensor, own: Tensor | None) -> Tensor:
        """Returns the norms of ``rows`` plus the product of the factors."""
        return row_norms(rows, a.flatten(1), b.flatten(1), own)

    def _known_norms(self, name: str, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Returns the norms of a quantized weight, which are computed once for the same codes."""
        stored, settings = self._parameters["weight"], self.adapter_settings[name]
        unknown = stored.is_meta or isinstance(rows, FakeTensor) or torch.compiler.is_compiling()
        if not isinstance(self, QuantizedLayer) or self.is_sharded or unknown:
            return None
        key = stored.data_ptr(), version_of(stored), dtype
        if settings.base_norms is None or settings.base_norms[0] != key:
            settings.base_norms = key, own_norms(rows, dtype)
        return settings.base_norms[1]

    def factor(self, name: str) -> Tensor:
        """Returns ``m / ||V||`` of one adapter, ``(out,)``, with gradients to ``m``."""
        if self.kept_factors is None or torch.is_grad_enabled():
            return self.magnitude(name) / self.norms(name)
        if name not in self.kept_factors:
            self.kept_factors[name] = self.magnitude(name) / self.norms(name)
        return self.kept_factors[name]

    def along_outputs(self, vector: Tensor, output: Tensor) -> Tensor:
        """Returns ``(out,)`` in a shape that goes with ``output``."""
        return vector

    def direction_output(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``V x``, without a bias."""
        result = self.base_forward(x, *args, **kwargs)
        bias = self._parameters.get("bias")
        if bias is not None:
            result = result - self.along_outputs(bias, result).to(result.dtype)
        return result + self.adapter_output(name, x, *args, **kwargs).to(result.dtype)

    def adapted_forward(self, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the sum of ``m / ||V|| V d``, and ``W`` times what is left of the input."""
        if not names:
            return self.base_forward(*args, **kwargs)
        x, *others = args or (kwargs.pop(next(iter(kwargs))),)
        kept = [self.lora_dropout[name](x) for name in names]
        outputs = []
        for name, some in zip(names, kept, strict=True):
            output = self.direction_output(name, some, *others, **kwargs)
            factor = self.along_outputs(self.factor(name), output)
            outputs.append((output * factor).to(output.dtype))
        total = reduce(torch.add, outputs)
        bias = self._parameters.get("bias")
        if len(kept) > 1 or kept[0] is not x:
            # With the bias.
            total = total + self.base_forward(x - reduce(torch.add, kept), *others, **kwargs)
        elif bias is not None:
            total = total + self.along_outputs(bias, total).to(total.dtype)
        return total

    def delta_weight(self, name: str, weight: Tensor | None = None) -> Tensor:
        """Returns ``m / ||V|| V - W`` for the ``W`` that is given."""
        assert weight is not None
        rows = self.outputs_as_rows(weight + self._low_rank(name, weight))
        return self.rows_as_weight(rows * self._factor_of(name, rows)) - weight

    def _low_rank(self, name: str, weight: Tensor) -> Tensor:
        """Returns ``s B A`` on the device of ``weight``."""
        return super().delta_weight(name, weight).to(weight.device)

    def _factor_of(self, name: str, rows: Tensor) -> Tensor:
        """Returns ``m / ||V||`` as ``(out, 1)`` for the rows of ``V``."""
        norms = own_norms(rows.detach(), rows.dtype).clamp_min(torch.finfo(rows.dtype).tiny)
        return (self.magnitude(name).to(norms.device) / norms).unsqueeze(1)

    def summed_delta(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """The sum of what the adapters ``names`` add to ``weight``, on its device."""
        for name in names:
            rows = self.outputs_as_rows(weight + self._low_rank(name, weight))
            # Merged, the weight does not tell it any more.
            self.adapter_settings[name].merged_factor = self._factor_of(name, rows).detach()
        return super().summed_delta(weight, names)

    def restored_weight(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """The weight before the adapters ``names`` were folded into ``weight``."""
        rows: Any = self.outputs_as_rows(weight)
        share: Any = 1
        for name in names:
            factor: Any = self.adapter_settings[name].merged_factor
            # The layer may have been moved since.
            factor = factor.to(weight.device)
            rows = rows - factor * self.outputs_as_rows(self._low_rank(name, weight))
            share = share + factor - 1
        return self.rows_as_weight(rows / share)


class DoraLinear(DoraLayer, LoraLinear):
    """``nn.Linear`` or ``Conv1D``; ``m`` is ``(out,)``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``m / ||V|| V x`` plus the bias for ``x`` of shape ``(..., in)``."""
        return AdapterLayer.forward(self, *args, **kwargs)

    def direction_output(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``V x``, without a bias, in one step where it can."""
        fused = fused_product(self, name, x)
        return super().direction_output(name, x, *args, **kwargs) if fused is None else fused


class DoraConvolution(DoraLayer, LoraConvolution):
    """A convolution, not transposed; ``m`` is ``(1, out, 1, ...)``."""

    def along_outputs(self, vector: Tensor, output: Tensor) -> Tensor:
        """Returns ``(out,)`` in a shape that goes with ``output``."""
        layer: Any = self
        return vector.view(-1, *[1] * len(layer.kernel_size))

    def norms_of(self, rows: Tensor, a: Tensor, b: Tensor, own: Tensor | None) -> Tensor:
        """Returns the norms of ``rows`` plus the product of the factors.

        In a grouped layer the product is not a kernel, and PEFT reads its numbers as one.
        """
        if self.groups == 1:
            return super().norms_of(rows, a, b, own)
        added = b.reshape(-1, len(a)) @ a.flatten(1)
        return own_norms(rows + added.view(rows.shape), a.dtype)


class DoraEmbedding(DoraLayer, LoraEmbedding):
    """``nn.Embedding``; ``m`` is ``(width,)``, and a norm is that of a column of the table."""

    adapter_layer_names = (*LoraEmbedding.adapter_layer_names, MAGNITUDE)

    def outputs_as_rows(self, weight: Tensor) -> Tensor:
        """Returns the table as ``(width, tokens)``; a view."""
        return weight.t()

    def rows_as_weight(self, rows: Tensor) -> Tensor:
        """Returns ``(width, tokens)`` as the table; a view."""
        return rows.t()

    def rows_with_adapters(
        self, rows: Tensor, names: Sequence[str], ids: Tensor, padding: int | None
    ) -> Tensor:
        """Returns the rows of the table that were looked up, with the adapters in them."""
        total = rows * (1 - len(names))
        for name in names:
            changed = rows + self.low_rank_rows(name, ids, padding).to(rows.dtype)
            total = total + (changed * self.factor(name)).to(rows.dtype)
        return total
