"""Momentum copies of adapted parts, such as teachers and target networks.

Such a copy is made by ``copy.deepcopy`` and updated by a loop over the ``parameters()`` of both.
Its adapters must start as the other side's and follow them; the frozen base is the same on both
sides and must not be averaged: packed 4-bit codes are not numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft.engine.adapters import adapted_layers, adapter_parameters
from lightning_peft.engine.fingerprint import fingerprint
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, LINEAR_LIKE
from lightning_peft.engine.layers.mixin import (
    DynamicMixin,
    add_mixin,
    remove_mixin,
    stored_parameter,
)
from lightning_peft.engine.record import MomentumCopy, Record, require_record
from lightning_peft.engine.selection.parts import inside
from lightning_peft.errors import LifecycleError

_PRODUCTS = (*LINEAR_LIKE, *CONVOLUTION_LIKE)


class HidesFrozenParameters(DynamicMixin):
    """Mixin for modules of which one follows the other: ``parameters()`` leaves the base out.

    What remains lines up on both sides: adapters, heads, and whatever else trains. The names,
    ``named_parameters()`` and ``state_dict()``, stay complete.
    """

    frozen_names: frozenset[str]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yields the parameters besides the frozen base; all of them where there are no others."""
        named = dict(self.named_parameters(recurse=recurse))  # type: ignore[attr-defined]
        others = [param for name, param in named.items() if name not in self.frozen_names]
        yield from others or named.values()


def find_momentum_copies(module: nn.Module) -> list[MomentumCopy]:
    """Returns the submodules that are copies of each other, outermost first.

    Blocks that repeat in one list do not count: ``nn.TransformerEncoder`` makes them by copying.
    """
    groups: dict[object, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        shapes = _shapes(child)
        if name and shapes and any(isinstance(x, _PRODUCTS) for x in child.modules()):
            groups.setdefault((type(child), shapes, _sample(child)), []).append((name, child))
    momentum_copies: list[MomentumCopy] = []
    for members in groups.values():
        for index, (name, child) in enumerate(members):
            if _covered(name, momentum_copies):
                continue
            for other, candidate in members[index + 1 :]:
                if not _covered(other, momentum_copies) and _are_copies(
                    name, child, other, candidate
                ):
                    momentum_copies.append(_momentum_copy(name, child, other, candidate))
    return momentum_copies


def unregistered_copies(module: nn.Module) -> dict[str, str]:
    """Returns copies that ``module`` keeps in lists, tuples or dictionaries, unregistered.

    Nothing can be done to those: they have no name, and no checkpoint holds them.

    Returns:
        Where a copy is, such as ``"teachers[0]"``, and the name of the submodule it is a copy of.
    """
    known = {id(child) for child in module.modules()}
    found: dict[str, str] = {}
    for owner, child in module.named_modules():
        for attribute, value in vars(child).items():
            for key, kept in _modules_in(value):
                if id(kept) in known or attribute == "_modules":
                    continue
                origin = next(
                    (n for n, x in module.named_modules() if n and are_equal(x, kept)), None
                )
                if origin is not None:
                    found[f"{owner}.{attribute}[{key!r}]".lstrip(".")] = origin
    return found


def _modules_in(value: object) -> list[tuple[object, nn.Module]]:
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return [(key, kept) for key, kept in items if isinstance(kept, nn.Module)]


def are_equal(child: nn.Module, kept: nn.Module) -> bool:
    """Whether two modules are of one class, and have the same parameters with the same values."""
    same = type(child) is type(kept) and () != _shapes(child) == _shapes(kept)
    return same and same_values(child, kept)


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """Returns the shapes of the parameters; none where lazy layers have not seen a batch."""
    named = list(module.named_parameters())
    lazy = any(is_lazy(param) for _, param in named)
    return () if lazy else tuple((name, param.shape) for name, param in named)


def _sample(module: nn.Module) -> tuple[float, ...]:
    """Returns a few values that copies have in common, and hardly any other two modules."""
    wide = [p for p in nn.Module.parameters(module) if p.ndim > 1 and not p.is_meta]
    if not wide:
        return ()
    flat = wide[0].detach().reshape(-1)
    return tuple(flat[:2].tolist() + flat[-2:].tolist())


def _covered(name: str, momentum_copies: list[MomentumCopy]) -> bool:
    return any(inside(name, [pair.source, pair.copy]) for pair in momentum_copies)


def _momentum_copy(name: str, child: nn.Module, other: str, candidate: nn.Module) -> MomentumCopy:
    first, second = (
        not any(p.requires_grad for p in nn.Module.parameters(x)) for x in (child, candidate)
    )
    if first and not second:
        return MomentumCopy(other, name, True)
    return MomentumCopy(name, other, second)


def _are_copies(name: str, child: nn.Module, other: str, candidate: nn.Module) -> bool:
    if re.sub(r"\d+", "*", name) == re.sub(r"\d+", "*", other) or inside(other, [name]):
        return False
    return same_values(child, candidate)


def same_values(child: nn.Module, candidate: nn.Module) -> bool:
    """Whether two modules with parameters of the same names and shapes hold the same values."""
    mine, theirs = dict(child.named_parameters()), dict(candidate.named_parameters())
    return all(
        not a.is_meta and a is not theirs[key] and a.dtype == theirs[key].dtype
        and torch.equal(a, theirs[key].to(a.device))
        for key, a in mine.items()
    ) and any(_varies(a) for a in mine.values())  # fmt: skip


def _varies(param: torch.Tensor) -> bool:
    flat = param.detach().flatten()
    return param.ndim > 1 and bool((flat != flat[0]).any())


def link_copies(
    module: nn.Module, momentum_copies: list[MomentumCopy], frozen: set[str], adapter_name: str
) -> None:
    """Makes the adapters of every copy start as those it copies, and hides the base from loops."""
    for pair in momentum_copies:
        source, copy = (module.get_submodule(name) for name in (pair.source, pair.copy))
        theirs = adapter_parameters(source)
        with torch.no_grad():
            for name, param in adapter_parameters(copy).items():
                if name in theirs and adapter_name in name.split("."):
                    param.copy_(theirs[name])
        if pair.frozen:
            freeze_copy(module, pair)
    hide_frozen_base(module, momentum_copies, frozen)


def hide_frozen_base(
    module: nn.Module, momentum_copies: list[MomentumCopy], frozen: Collection[str]
) -> None:
    """Leaves the frozen base out of the ``parameters()`` of both sides, and of their wrappers."""
    for pair in momentum_copies:
        for root in (_with_wrappers(module, pair.source), _with_wrappers(module, pair.copy)):
            for name, child in module.get_submodule(root).named_modules():
                prefix = f"{root}.{name}." if name else f"{root}."
                own = (n.removeprefix(prefix) for n in frozen if n.startswith(prefix))
                if not isinstance(child, HidesFrozenParameters):
                    add_mixin(child, HidesFrozenParameters)
                child.frozen_names = frozenset(own)


def _with_wrappers(module: nn.Module, name: str) -> str:
    """Returns the outermost submodule that holds the one called ``name`` and nothing else.

    ``AveragedModel`` and other classes that keep an average hold the copy as their only submodule.
    """
    inner = {id(p) for p in nn.Module.parameters(module.get_submodule(name))}
    pieces = name.split(".")
    for count in range(1, len(pieces)):
        outer = ".".join(pieces[:count])
        if {id(p) for p in nn.Module.parameters(module.get_submodule(outer))} == inner:
            return outer
    return name


def freeze_copy(module: nn.Module, pair: MomentumCopy) -> None:
    """Stops gradients into the adapters of a copy: they follow, they do not train."""
    pair.frozen = True
    for layer in adapted_layers(module.get_submodule(pair.copy)).values():
        if isinstance(layer, AdapterLayer):
            layer.is_momentum_copy = True
            layer.train_adapters(())


def freeze_unoptimized_copies(module: nn.Module, held: set[int]) -> None:
    """Freezes copies that no optimizer holds while it holds what they copy."""
    for pair in require_record(module).momentum_copies:
        source, copy = (
            [p for p in adapter_parameters(module.get_submodule(name)).values() if p.requires_grad]
            for name in (pair.source, pair.copy)
        )
        if copy and {id(p) for p in source} <= held and not {id(p) for p in copy} & held:
            freeze_copy(module, pair)


def unlink_copies(module: nn.Module, momentum_copies: list[MomentumCopy]) -> None:
    """Undoes :func:`link_copies`."""
    for pair in momentum_copies:
        for name in (pair.source, pair.copy):
            for child in module.get_submodule(_with_wrappers(module, name)).modules():
                if isinstance(child, HidesFrozenParameters):
                    remove_mixin(child, HidesFrozenParameters)
                    del child.frozen_names


def frozen_names(record: Record, pair: MomentumCopy) -> set[str]:
    """Returns the names of the frozen weights of a copy: those of what it copies, below it."""
    leading = [name for name in record.frozen if inside(name, [pair.source])]
    return {pair.copy + name.removeprefix(pair.source) for name in leading}


def check_momentum_copies(module: nn.Module) -> None:
    """Compares the frozen base of every copy with what it was at the first call."""
    record = require_record(module)
    for pair in record.momentum_copies:
        names = sorted(frozen_names(record, pair))
        owners = [(name, *name.rpartition(".")[::2]) for name in names]
        stored = [(n, stored_parameter(module.get_submodule(o), leaf)) for n, o, leaf in owners]
        codes = [(n, p) for n, p in stored if not p.is_floating_point()]
        now = tuple(fingerprint(codes).sums)
        pair.base = now if pair.base is None else pair.base
        if now != pair.base:
            raise LifecycleError(
                f"{pair.copy!r} follows {pair.source!r}, and the update wrote into its "
                f"quantized weights, such as {codes[0][0]!r}: averages of 4-bit codes are no "
                "weights. Update over `parameters()`, which leaves the frozen base out, instead "
                "of over `state_dict()` or `named_parameters()`; or use LoRAStrategy."
            )
