"""Adapted layers that no optimizer holds on purpose, such as those of an unused network."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lightning_peft.engine.adapters import activate, adapted_layers_of, adapter_parameters
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.record import require_record


def freeze_unoptimized(module: nn.Module, held: Collection[int], freeze: bool = True) -> list[str]:
    """Freezes the adapters of layers of which the optimizers hold nothing, if they name layers.

    They do where they hold the frozen weights of other adapted layers with their adapters: then
    ``configure_optimizers`` listed submodules, and left these out. A list of adapters alone, or of
    weights without their adapters, does not show that.

    Args:
        module: The user's module, with adapters.
        held: The ids of all parameters in optimizers.
        freeze: Whether to freeze them too. Not where several processes train: they have agreed on
            what has gradients by then.

    Returns:
        The names of these layers.
    """
    record = require_record(module)
    listed, unoptimized = False, {}
    for name, layer in adapted_layers_of(module, record).items():
        adapters = [p for p in adapter_parameters(layer).values() if p.requires_grad]
        base = id(stored_parameter(layer, "weight")) in held
        found = [id(param) in held for param in adapters]
        listed = listed or (base and bool(found) and all(found))
        if adapters and not base and not any(found):
            unoptimized[name] = adapters
    if not listed:
        return []
    for param in (param for adapters in unoptimized.values() for param in adapters if freeze):
        param.requires_grad_(False)
    record.unoptimized = list(unoptimized)
    return record.unoptimized


def unfreeze_unoptimized(module: nn.Module) -> None:
    """Undoes :func:`freeze_unoptimized` before a fit whose optimizers may hold other layers."""
    record = require_record(module)
    if record.unoptimized:
        record.unoptimized = []
        for name in record.parts:
            activate(module.get_submodule(name), record.active)
