"""Copies that follow another part of the module, as momentum teachers and target networks do.

Such a copy is made by ``copy.deepcopy`` and updated by a loop over the ``parameters()`` of both.
Its adapters must start as the other side's and follow them; the frozen base is the same on both
sides and must not be averaged: packed 4-bit codes are no numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn

from lightning_peft.engine.adapters import adapted_layers, adapter_parameters
from lightning_peft.engine.fingerprint import fingerprint
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, LINEAR_LIKE
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.engine.layers.mixin import (
    DynamicMixin,
    add_mixin,
    remove_mixin,
    stored_parameter,
)
from lightning_peft.engine.record import Record, Twin, require_record
from lightning_peft.engine.selection.parts import inside
from lightning_peft.errors import LifecycleError

_PRODUCTS = (*LINEAR_LIKE, *CONVOLUTION_LIKE)


class Following(DynamicMixin):
    """Mixin for modules of which one follows the other: ``parameters()`` leaves the base out.

    What remains lines up on both sides: adapters, heads, and whatever else trains. The names,
    ``named_parameters()`` and ``state_dict()``, stay complete.
    """

    base_names: frozenset[str]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yields the parameters besides the frozen base; all of them where there are no others."""
        named = dict(self.named_parameters(recurse=recurse))  # type: ignore[attr-defined]
        others = [param for name, param in named.items() if name not in self.base_names]
        yield from others or named.values()


def find_twins(module: nn.Module) -> list[Twin]:
    """Returns the submodules that are copies of each other, outermost first.

    Blocks that repeat in one list are no twins: ``nn.TransformerEncoder`` makes them by copying.

    Args:
        module: The user's module, before anything was done to it.
    """
    groups: dict[object, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        shapes = tuple((n, p.shape) for n, p in child.named_parameters())
        if name and shapes and any(isinstance(x, _PRODUCTS) for x in child.modules()):
            groups.setdefault((type(child), shapes, _sample(child)), []).append((name, child))
    twins: list[Twin] = []
    for members in groups.values():
        for index, (name, child) in enumerate(members):
            if _covered(name, twins):
                continue
            for other, candidate in members[index + 1 :]:
                if not _covered(other, twins) and _are_copies(name, child, other, candidate):
                    twins.append(_twin(name, child, other, candidate))
    return twins


def copies_outside(module: nn.Module) -> dict[str, str]:
    """Returns copies that ``module`` keeps in lists, tuples or dictionaries, unregistered.

    Nothing can be done to those: they have no name, and no checkpoint holds them.

    Args:
        module: The user's module, before anything was done to it.

    Returns:
        Where a copy is, such as ``"teachers[0]"``, and the name of the submodule it is a copy of.
    """
    known = {id(child) for child in module.modules()}
    found: dict[str, str] = {}
    for owner, child in module.named_modules():
        for attribute, value in vars(child).items():
            for key, kept in _kept_in(value):
                if id(kept) in known or attribute == "_modules":
                    continue
                origin = next((n for n, x in module.named_modules() if n and _equal(x, kept)), None)
                if origin is not None:
                    found[f"{owner}.{attribute}[{key!r}]".lstrip(".")] = origin
    return found


def _kept_in(value: object) -> list[tuple[object, nn.Module]]:
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return [(key, kept) for key, kept in items if isinstance(kept, nn.Module)]


def _equal(child: nn.Module, kept: nn.Module) -> bool:
    shapes = [[(n, p.shape) for n, p in x.named_parameters()] for x in (child, kept)]
    return type(child) is type(kept) and shapes[0] == shapes[1] and same_values(child, kept)


def _sample(module: nn.Module) -> tuple[float, ...]:
    """Returns a few values that copies have in common, and hardly any other two modules."""
    wide = [p for p in nn.Module.parameters(module) if p.ndim > 1 and not p.is_meta]
    if not wide:
        return ()
    flat = wide[0].detach().reshape(-1)
    return tuple(flat[:2].tolist() + flat[-2:].tolist())


def _covered(name: str, twins: list[Twin]) -> bool:
    return any(inside(name, [twin.leader, twin.follower]) for twin in twins)


def _twin(name: str, child: nn.Module, other: str, candidate: nn.Module) -> Twin:
    first, second = (
        not any(p.requires_grad for p in nn.Module.parameters(x)) for x in (child, candidate)
    )
    if first and not second:
        return Twin(other, name, True)
    return Twin(name, other, second)


def _are_copies(name: str, child: nn.Module, other: str, candidate: nn.Module) -> bool:
    if re.sub(r"\d+", "*", name) == re.sub(r"\d+", "*", other) or inside(other, [name]):
        return False
    return same_values(child, candidate)


def same_values(child: nn.Module, candidate: nn.Module) -> bool:
    """Says whether two modules with parameters of the same names and shapes hold the same values.

    Args:
        child: One of them.
        candidate: The other one. It shares no parameter with ``child``.
    """
    mine, theirs = dict(child.named_parameters()), dict(candidate.named_parameters())
    return all(
        not a.is_meta and a is not theirs[key] and a.dtype == theirs[key].dtype
        and torch.equal(a, theirs[key].to(a.device))
        for key, a in mine.items()
    ) and any(_varies(a) for a in mine.values())  # fmt: skip


def _varies(param: torch.Tensor) -> bool:
    flat = param.detach().flatten()
    return param.ndim > 1 and bool((flat != flat[0]).any())


def follow(module: nn.Module, twins: list[Twin], frozen: set[str], adapter_name: str) -> None:
    """Makes the adapters of every copy start as those it copies, and hides the base from loops.

    Args:
        module: The user's module, with adapters.
        twins: What :func:`find_twins` found before.
        frozen: Names of the frozen base parameters.
        adapter_name: Name of the adapter that was added.
    """
    for twin in twins:
        leader, follower = (module.get_submodule(name) for name in (twin.leader, twin.follower))
        theirs = adapter_parameters(leader)
        with torch.no_grad():
            for name, param in adapter_parameters(follower).items():
                if name in theirs and adapter_name in name.split("."):
                    param.copy_(theirs[name])
        if twin.frozen:
            freeze_follower(module, twin)
    hide_base(module, twins, frozen)


def hide_base(module: nn.Module, twins: list[Twin], frozen: Collection[str]) -> None:
    """Leaves the frozen base out of the ``parameters()`` of both sides, and of their wrappers.

    Args:
        module: The user's module, with adapters.
        twins: The copies.
        frozen: Names of the frozen base parameters.
    """
    for twin in twins:
        for root in (_with_wrappers(module, twin.leader), _with_wrappers(module, twin.follower)):
            for name, child in module.get_submodule(root).named_modules():
                prefix = f"{root}.{name}." if name else f"{root}."
                own = (n.removeprefix(prefix) for n in frozen if n.startswith(prefix))
                if not isinstance(child, Following):
                    add_mixin(child, Following)
                child.base_names = frozenset(own)


def _with_wrappers(module: nn.Module, name: str) -> str:
    """Returns the outermost submodule that holds the one called ``name`` and nothing besides.

    ``AveragedModel`` and other classes that keep an average hold the copy as their only submodule.
    """
    inner = {id(p) for p in nn.Module.parameters(module.get_submodule(name))}
    pieces = name.split(".")
    for count in range(1, len(pieces)):
        outer = ".".join(pieces[:count])
        if {id(p) for p in nn.Module.parameters(module.get_submodule(outer))} == inner:
            return outer
    return name


def freeze_follower(module: nn.Module, twin: Twin) -> None:
    """Stops gradients into the adapters of a copy: they follow, they do not train."""
    twin.frozen = True
    for layer in adapted_layers(module.get_submodule(twin.follower)).values():
        if isinstance(layer, LoraLayer):
            layer.lora_is_momentum_copy = True
            for name in layer.lora_adapters:
                for factor in layer.factors(name):
                    factor.requires_grad_(False)


def freeze_left_out(module: nn.Module, held: set[int]) -> None:
    """Freezes copies that no optimizer holds while it holds what they copy.

    Args:
        module: The user's module, with adapters.
        held: The ids of all parameters in optimizers.
    """
    for twin in require_record(module).twins:
        leader, follower = (
            [p for p in adapter_parameters(module.get_submodule(name)).values() if p.requires_grad]
            for name in (twin.leader, twin.follower)
        )
        if follower and {id(p) for p in leader} <= held and not {id(p) for p in follower} & held:
            freeze_follower(module, twin)


def unfollow(module: nn.Module, twins: list[Twin]) -> None:
    """Undoes :func:`follow`."""
    for twin in twins:
        for name in (twin.leader, twin.follower):
            for child in module.get_submodule(_with_wrappers(module, name)).modules():
                if isinstance(child, Following):
                    remove_mixin(child, Following)
                    del child.base_names


def base_names(record: Record, twin: Twin) -> set[str]:
    """Returns the names of the frozen weights of a copy: those of what it copies, below it."""
    leading = [name for name in record.frozen if inside(name, [twin.leader])]
    return {twin.follower + name.removeprefix(twin.leader) for name in leading}


def check_followers(module: nn.Module) -> None:
    """Compares the frozen base of every copy with what it was at the first call.

    Raises:
        LifecycleError: If a loop went past ``parameters()`` and averaged it.
    """
    record = require_record(module)
    for twin in record.twins:
        names = sorted(base_names(record, twin))
        owners = [(name, *name.rpartition(".")[::2]) for name in names]
        stored = [(n, stored_parameter(module.get_submodule(o), leaf)) for n, o, leaf in owners]
        codes = [(n, p) for n, p in stored if not p.is_floating_point()]
        now = tuple(fingerprint(codes).sums)
        twin.base = now if twin.base is None else twin.base
        if now != twin.base:
            raise LifecycleError(
                f"{twin.follower!r} follows {twin.leader!r}, and the update wrote into its "
                f"quantized weights, such as {codes[0][0]!r}: averages of 4-bit codes are no "
                "weights. Update over `parameters()`, which leaves the frozen base out, instead "
                "of over `state_dict()` or `named_parameters()`; or use LoRAStrategy."
            )
