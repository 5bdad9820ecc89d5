"""LightningModules of the recipes; they know nothing of adapters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_peft.plugin.namespace import for_imported

if TYPE_CHECKING:
    from lightning_peft.tasks.causal_lm import CausalLM as CausalLM

_HOMES = {"CausalLM": "causal_lm"}

__all__ = ["CausalLM"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return for_imported(getattr(import_module(f"{__name__}.{_HOMES[name]}"), name))
