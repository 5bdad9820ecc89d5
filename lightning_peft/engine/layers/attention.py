"""PEFT's adapter on ``nn.MultiheadAttention``, without what it does to the frozen weights.

PEFT adds the adapter to the weights before each forward pass and subtracts it afterwards. What
that leaves is another parameter object, in another place among the parameters, and not quite the
weight from before: the frozen base moves by rounding errors, most of all in bfloat16. Walking
through the modules replaces the parameters too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine.layers.mixin import DynamicMixin, add_mixin


class AttentionMixin(DynamicMixin):
    """Mixin for PEFT's layer that puts the same parameters back, bit for bit.

    Attributes:
        merged_adapters: PEFT's names of the adapters that are in the weights now.
        unmerged: The parameters from before, for the attention and its output projection.
    """

    merged_adapters: list[str]
    unmerged: list[dict[str, Any]]

    def holders(self) -> tuple[Any, Any]:
        """Returns the two modules whose weights are merged into."""
        base = self.get_base_layer()  # type: ignore[attr-defined]
        return base, base.out_proj.get_base_layer()

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merges as PEFT does; the merged weights stay parameters where they need no gradient."""
        before = [dict(holder._parameters) for holder in self.holders()]
        if not self.merged_adapters:
            self.unmerged = before
        super().merge(*args, **kwargs)  # type: ignore[misc]
        if not torch.is_grad_enabled():
            for holder, params in zip(self.holders(), before, strict=True):
                _register(holder, params)

    def unmerge(self) -> None:
        """Puts the parameters from before back."""
        if not self.merged_adapters:
            return
        for holder, params in zip(self.holders(), self.unmerged, strict=True):
            for name, param in params.items():
                now = getattr(holder, name)
                if param is not None and now is not param:
                    # The module may have moved while it was merged.
                    param.data = param.data.to(now.device, now.dtype)
            _put_back(holder, params)
        self.unmerged = []
        self.merged_adapters.clear()
        self.get_base_layer().out_proj.merged_adapters.clear()  # type: ignore[attr-defined]

    def _restore_weights(self) -> None:
        """Registers merged weights that PEFT left as plain tensors."""
        for holder, params in zip(self.holders(), self.unmerged, strict=False):
            _register(holder, params)

    def unwrapped(self) -> nn.Module:
        """Returns the attention as it was before PEFT wrapped it, with the weights of now."""
        base, out_proj = self.holders()
        base.out_proj = out_proj
        attention: nn.Module = base
        return attention


def parameters_of(attention: Any) -> list[dict[str, Any]]:
    """Returns the parameters of an attention and of its output projection, in their order."""
    return [dict(attention._parameters), dict(attention.out_proj._parameters)]


def preserve_parameters(wrapper: Any, before: list[dict[str, Any]]) -> None:
    """Turns PEFT's new ``wrapper`` into one that keeps the parameters ``before``."""
    add_mixin(wrapper, AttentionMixin)
    wrapper.unmerged = []
    for holder, params in zip(wrapper.holders(), before, strict=True):
        _put_back(holder, params)


def _put_back(holder: Any, params: dict[str, Any]) -> None:
    for name in params:
        holder.__dict__.pop(name, None)
    holder._parameters = params


def _register(holder: Any, params: dict[str, Any]) -> None:
    """Makes plain tensors that took the place of ``params`` parameters, in the same order."""
    holder._parameters = {
        name: nn.Parameter(holder.__dict__.pop(name), requires_grad=False)
        if isinstance(holder.__dict__.get(name), Tensor)
        else holder._parameters[name]
        for name in params
    }
