"""Train and eval mode of submodules while adapters train."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_peft.compat.torch import BatchNorm
from lightning_peft.engine.adapters import adapted_layers
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.record import adapted_parts, require_record
from lightning_peft.engine.selection.parts import is_pretrained
from lightning_peft.engine.selection.scope import is_frozen, left_modules


def set_training_mode(module: nn.Module) -> None:
    """Sets the adapted parts of ``module`` to train mode; everything else keeps its mode.

    ``from_pretrained`` returns models in eval mode and Lightning keeps it: dropout and gradient
    checkpointing would be off. In eval mode stay: copies that follow what trains; what is left as
    it is; batch norms, whose statistics belong to the base and are in no adapter file; and what
    :func:`user_eval_modules` found. Adapters are in train mode everywhere but in copies.
    """
    record = require_record(module)
    apart = set(left_modules(module, record.left or {}))
    for pair in record.momentum_copies:
        apart |= set(module.get_submodule(pair.copy).modules())
    fixed = apart | {child for n, child in module.named_modules() if n in record.eval_modules}
    for _, part in adapted_parts(module):
        modes = {child: child.training for child in part.modules()}
        part.train()
        for child, mode in modes.items():
            if child in fixed or (isinstance(child, BatchNorm) and not mode):
                child.training = mode
        for layer in adapted_layers(part).values():
            if layer not in apart and isinstance(layer, AdapterLayer):
                for name in layer.adapter_module_names:
                    getattr(layer, name).train()


def user_eval_modules(module: nn.Module, parts: Iterable[str]) -> set[str]:
    """Returns the names of what the user set to eval mode and did not freeze.

    That is what is in eval mode inside of a part, or of a pretrained model, that is in train mode
    itself: a network that only ``no_grad`` shields, or a dropout that is switched off.
    """
    found: set[str] = set()

    def look(name: str, child: nn.Module, owner_trains: bool) -> None:
        if is_frozen(child):
            return
        if is_pretrained(child):
            owner_trains = child.training
        if owner_trains and not child.training:
            found.add(name)
        for last, below in child.named_children():
            look(f"{name}.{last}".lstrip("."), below, owner_trains)

    for name in parts:
        part = module.get_submodule(name)
        look(name, part, part.training)
    return found
