"""Freezing of parameters at injection, and restoring of ``requires_grad``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.record import AdaptedModuleRecord
from lightning_peft.engine.selection.parts import inside, parameter_holders, parameter_names


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

    Args:
        module: The user's module, whose names the record uses.
        entry: The part's record; ``frozen`` is filled, and ``initial_values`` at the first adapter.
        biases: PEFT's ``bias``.
        targets: Names of the adapted layers, relative to the part.
        requires_grad_before: ``requires_grad`` before injection, by the id of the parameter.
        kept: The ids of the parameters of submodules that stay as they are.
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
