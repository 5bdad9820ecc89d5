"""LoRA on ``in_proj_weight`` of ``nn.MultiheadAttention``.

PEFT's layer adds the adapter to the frozen weights before each forward pass and subtracts it
afterwards, which moves them by rounding errors. Here the weight that is read has the adapter in it.
The projection behind it, ``out_proj``, gets one with it, as PEFT specifies; it is a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lightning_peft.compat.peft import MultiheadAttention
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.engine.layers.mixin import AttentionWeight

PROJECTION = "out_proj"


def projections(part: nn.Module, targets: Iterable[str]) -> list[str]:
    """Returns the names of the projections behind those of ``targets`` that are attentions."""
    found = [t for t in targets if isinstance(part.get_submodule(t), nn.MultiheadAttention)]
    return [f"{target}.{PROJECTION}" for target in found]


def with_projections(part: nn.Module, targets: Iterable[str]) -> list[str]:
    """Returns ``targets`` and the projections behind the attentions in them, in module order."""
    named = {*targets, *projections(part, targets)}
    return [name for name, _ in part.named_modules() if name in named]


@cache
def times_added() -> int:
    """Returns how often PEFT's layer adds the adapter of ``out_proj`` to its weight.

    Twice in PEFT 0.21, whose files then mean twice the adapter.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        config = LoraConfig(r=1, init_lora_weights=False)
        theirs = MultiheadAttention(nn.MultiheadAttention(4, 1), "default", config, r=1)
    projection: Any = theirs.get_base_layer().out_proj
    before = projection.weight.detach().clone()
    theirs.merge()
    added = projection.weight.detach() - before
    once = projection.get_delta_weight("default").detach()
    return round((added.norm() / once.norm()).item())


def projection_scale(part: nn.Module, targets: Iterable[str]) -> int:
    """Returns how often the adapters of projections count, which the installed PEFT decides.

    1 where none of ``targets`` is an attention that is adapted in place.
    """
    return times_added() if projections(part, targets) else 1


def scale_problem(saved: Any, now: int) -> list[str]:
    """Returns a sentence where :func:`projection_scale` was another one when a file was written."""
    if saved in (None, now):
        return []
    return [
        f"adapters of {PROJECTION} behind attentions count {saved} times in the PEFT that wrote it "
        f"and {now} times in the installed one. Install the PEFT of that run"
    ]


def attention_factors(layer: Any, make: Callable[[nn.Module], nn.Module]) -> Any:
    """Returns PEFT's adapter for the input of an attention, with that of ``out_proj`` on it."""
    # PEFT makes that of the projection, and again after the other one.
    make(layer.out_proj)
    width = layer.embed_dim
    made: Any = make(skip_init(nn.Linear, width, 3 * width, bias=False, device="cpu"))
    behind: Any = make(layer.out_proj)
    behind.scaling = {name: scale * times_added() for name, scale in behind.scaling.items()}
    made.__dict__["behind"] = behind
    return made


class LoraAttention(LoraLayer, AttentionWeight):
    """``nn.MultiheadAttention``: ``A`` is ``(r, width)`` and ``B`` is ``(3 * width, r)``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns output and weights of attention, from the weights that torch reads."""
        return super(AdapterLayer, self).forward(*args, **kwargs)  # type: ignore[misc]

    def delta_weight(self, name: str, weight: Tensor | None = None) -> Tensor:
        """Returns ``s B A``."""
        a, b = self.upcast_factors(name)
        return b @ a
