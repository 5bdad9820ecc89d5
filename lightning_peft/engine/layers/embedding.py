"""Embeddings with a computed weight, of which only the looked-up rows are computed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_peft.engine.layers.kinds import has_standard_forward
from lightning_peft.engine.layers.mixin import LayerMixin
from lightning_peft.engine.layers.weight_view import WeightView


class EmbeddingLookup(LayerMixin):
    """An embedding that computes the rows that are looked up.

    The forward pass is the class's own. Where it looks rows up in ``weight``, it gets those of
    :meth:`look_up`; scales and offsets of subclasses apply to them.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the class's output, with :meth:`look_up` in place of the lookup."""
        layer: Any = self
        if has_standard_forward(layer) and not self.weight_is_stored():
            return self.look_up(
                args[0] if args else next(iter(kwargs.values())),
                None,
                layer.padding_idx,
                scale_grad_by_freq=layer.scale_grad_by_freq,
                sparse=layer.sparse,
            )
        rows: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        return rows

    @property
    def weight(self) -> Any:
        """The weight as code means it that reads it, looked up row by row where it can be."""
        view = super().weight
        if isinstance(view, WeightView):
            view.overrides[F.embedding] = self.look_up
        return view

    def look_up(self, input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``F.embedding`` of the effective weight, without making that weight."""
        raise NotImplementedError
