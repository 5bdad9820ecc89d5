"""Registration of ``"lora"`` and ``"qlora"`` in Lightning's strategy registries."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning, call_after_import

_WRITTEN = "lightning_peft.plugin.strategies"
_STRATEGIES = {
    "lora": ("LoRAStrategy", "LoRA adapters on the pretrained parts, on one device or several"),
    "qlora": ("QLoRAStrategy", "LoRA adapters on a 4-bit (NF4) base, on one device or several"),
}


def register() -> None:
    """Registers the strategies in every Lightning package, now or when it is imported."""
    for root in ROOTS:
        call_after_import(f"{root}.strategies", partial(_register, root))
    call_after_import(_WRITTEN, _accept_classes)


def _register(root: str, strategies: ModuleType) -> None:
    for name, (class_name, description) in _STRATEGIES.items():
        if name not in strategies.StrategyRegistry:
            strategies.StrategyRegistry.register(
                name, partial(_build_strategy, class_name, root), description=description
            )
    # Without importing the classes, which import the engine.
    if _WRITTEN in sys.modules:
        _accept_classes(sys.modules[_WRITTEN])


def _accept_classes(written: ModuleType) -> None:
    """Makes the classes subclasses of every imported Lightning's ``Strategy``.

    Lightning and LightningCLI check the class before an instance is bound to one of them.
    """
    for root in ROOTS:
        base = getattr(sys.modules.get(f"{root}.strategies"), "Strategy", None)
        for class_name, _ in _STRATEGIES.values():
            # Missing while the module is being imported, which calls again at its end.
            if base is not None and hasattr(written, class_name):
                base.register(getattr(written, class_name))


def _build_strategy(class_name: str, root: str, **arguments: Any) -> Any:
    written = getattr(import_module(_WRITTEN), class_name)
    return bind_to_lightning(written, root)(**arguments)
