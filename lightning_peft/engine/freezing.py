"""Freezing of parameters at injection, restoring of ``requires_grad``, and train mode."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from lightning_peft.compat.torch import BatchNorm
from lightning_peft.engine.adapters import adapted_layers, adapter_parameters
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.record import AdaptedModuleRecord, adapted_parts, require_record
from lightning_peft.engine.selection.parts import (
    inside,
    is_pretrained,
    parameter_holders,
    parameter_names,
)
from lightning_peft.engine.selection.scope import is_frozen, left_modules


def freeze_base(
    module: nn.Module,
    entry: AdaptedModuleRecord,
    biases: str,
    targets: list[str],
    requires_grad_before: Mapping[int, bool],
    kept: Collection[int] = (),
) -> None:
    """Freezes a part except adapters, saved modules, chosen biases and heads; records the names.

    A parameter that a head shares with the base is frozen: it is as pretrained as the base. A head
    registered under two names is one head.
    """
    part = module.get_submodule(entry.name)
    adapters = {id(param) for param in adapter_parameters(part).values()}
    params = dict(part.named_parameters(remove_duplicate=False))
    holders = parameter_holders(part)
    frozen = set()
    for known in parameter_names(part).values():
        param = params[known[0]]
        if id(param) in adapters:
            continue
        mine = "none" if id(param) in kept else biases
        if any(_is_trained(name, entry.saved, mine, targets) for name in known):
            param.requires_grad_(True)
        elif id(param) in kept or all(inside(name, entry.heads) for name in holders[id(param)]):
            param.requires_grad_(requires_grad_before[id(param)])
        else:
            param.requires_grad_(False)
            frozen.add(id(param))
    entry.frozen = {
        name
        for name, param in module.named_parameters(remove_duplicate=False)
        if id(param) in frozen
    }
    if len(entry.adapters) == 1:
        entry.initial_values = _trained_values(part, entry.saved, biases, targets, kept)


def _trained_values(
    part: nn.Module, saved: list[str], biases: str, targets: list[str], kept: Collection[int]
) -> dict[str, Tensor]:
    values = {
        name: param.detach()
        for name, param in part.named_parameters()
        if _is_trained(name, saved, "none" if id(param) in kept else biases, targets)
    }
    values |= {name: value for name, value in part.named_buffers() if inside(name, saved)}
    # Kept on the CPU: they are needed only while adapters are disabled.
    return {name: v.clone() if v.is_meta else v.cpu().clone() for name, v in values.items()}


def _is_trained(name: str, saved: list[str], biases: str, targets: list[str]) -> bool:
    owner, _, leaf = name.rpartition(".")
    if inside(name, saved):
        return True
    if leaf != "bias" or biases == "none":
        return False
    return biases == "all" or owner.removesuffix(".base_layer") in targets


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
