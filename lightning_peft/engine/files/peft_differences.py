"""Adapters that PEFT, and what is built on it, would read from a folder as another function."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_peft.engine.layers.kinds import (
    CONVOLUTIONS,
    TRANSPOSED,
    has_standard_forward,
    is_dilated,
    pads_with_values,
)
from lightning_peft.engine.record import AdaptedModuleRecord


def peft_differences(part: nn.Module, entry: AdaptedModuleRecord, name: str) -> list[str]:
    """Returns a sentence for each adapted layer that PEFT computes otherwise or not at all.

    Args:
        part: The adapted submodule.
        entry: Its record.
        name: The adapter's name.
    """
    info = entry.adapters[name]
    if not info.in_place:
        return []
    reasons = {target: _reason(part.get_submodule(target)) for target in info.targets}
    return [
        f"{entry.qualified(target)} ({_called(part.get_submodule(target))}): {reason}"
        for target, reason in reasons.items()
        if reason
    ]


def _called(layer: nn.Module) -> str:
    origin: type = getattr(layer, "origin_class", type(layer))
    return origin.__name__


def _reason(layer: Any) -> str | None:
    if isinstance(layer, TRANSPOSED):
        return "PEFT has no adapters for transposed convolutions, and refuses the folder"
    if isinstance(layer, CONVOLUTIONS):
        if pads_with_values(layer):
            return (
                f"PEFT applies the adapter without padding_mode={layer.padding_mode!r}, so that "
                "its output differs at the borders"
            )
        if is_dilated(layer):
            return (
                f"PEFT applies the adapter without dilation={tuple(layer.dilation)}, so that its "
                "output differs or has another size"
            )
    if not has_standard_forward(layer) and not hasattr(layer, "embed_scale"):
        return (
            "its class has a forward pass of its own. Here that uses the weight plus the adapter, "
            "and PEFT adds the adapter to its output"
        )
    return None
