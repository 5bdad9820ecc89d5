"""The names ``"lora"`` and ``"qlora"`` in the strategy registry of each Lightning package."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning, call_after_import

_STRATEGIES = {
    "lora": ("LoRAStrategy", "LoRA adapters on the pretrained parts, on one device or several"),
    "qlora": ("QLoRAStrategy", "LoRA adapters on a 4-bit (NF4) base, on one device or several"),
}


def register() -> None:
    """Registers the strategies in every Lightning package, now or when it is imported."""
    for root in ROOTS:
        call_after_import(f"{root}.strategies", partial(_register, root))


def _register(root: str, strategies: ModuleType) -> None:
    for name, (class_name, description) in _STRATEGIES.items():
        if name not in strategies.StrategyRegistry:
            strategies.StrategyRegistry.register(
                name, partial(_build_strategy, class_name, root), description=description
            )
        written = getattr(import_module("lightning_peft.plugin.strategies"), class_name)
        # Lightning and LightningCLI check the class before an instance is bound to one of them.
        strategies.Strategy.register(written)


def _build_strategy(class_name: str, root: str, **arguments: Any) -> Any:
    written = getattr(import_module("lightning_peft.plugin.strategies"), class_name)
    return bind_to_lightning(written, root)(**arguments)
