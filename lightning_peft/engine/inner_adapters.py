"""Adapters that a submodule had before the module around it: a loaded adapter, or an earlier run's.

Adding others in their place would throw away what they learned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from lightning_peft.engine.adapters import all_adapter_parameters
from lightning_peft.engine.files.adapter_files import replace_save_pretrained
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.record import Record, record_of, require_record, set_record
from lightning_peft.engine.selection.parts import inside
from lightning_peft.errors import LifecycleError, itemize


def adopt_inner_adapters(module: nn.Module) -> None:
    """Moves the records of submodules to ``module``, which trains their adapters from now on.

    Submodules whose adapters are frozen, such as a teacher, keep theirs.

    Raises:
        LifecycleError: If other adapters are active in one submodule than in another.
    """
    if record_of(module) is not None:
        return
    inner: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        trains = any(param.requires_grad for param in all_adapter_parameters(child))
        if trains and not inside(name, inner):
            inner[name] = child
    active = {require_record(child).active for child in inner.values()}
    if len(active) > 1:
        raise LifecycleError(
            f"Submodules of {type(module).__name__} have other adapters active than each other: "
            f"{', '.join(map(str, sorted(active)))}. Give them one name, by `adapter_name`."
        )
    if not inner:
        return
    record = Record(active=active.pop(), left={})
    for name, child in inner.items():
        _add(record, module, name, child)
        set_record(child, None)
    set_record(module, record)
    replace_save_pretrained(module)


def _add(record: Record, module: nn.Module, name: str, child: nn.Module) -> None:
    """Adds what ``child``, called ``name``, has in its record, by names relative to ``module``."""

    def outer(inner: str) -> str:
        return f"{name}.{inner}" if inner else name

    own, params = require_record(child), dict(child.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for key, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(key)
    for part, entry in own.parts.items():
        frozen = {key for inner in entry.frozen for key in names[id(params[inner])]}
        record.parts[outer(part)] = replace(entry, name=outer(part), frozen=frozen, taken_over=True)
    record.momentum_copies += [
        replace(pair, source=outer(pair.source), copy=outer(pair.copy))
        for pair in own.momentum_copies
    ]
    record.left = {**(record.left or {}), **{outer(k): why for k, why in (own.left or {}).items()}}
    record.eval_modules |= set(map(outer, own.eval_modules))
    record.unoptimized += map(outer, own.unoptimized)
    record.staged |= frozenset(map(outer, own.staged))
    record.built |= {outer(key): built for key, built in own.built.items()}
    record.excluded |= set(map(outer, own.excluded))
    record.changed |= set(map(outer, own.changed))


def refuse_replacing_adapters(parts: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuses to add the first adapters to parts that have some already."""
    there = [
        f"{part}.{name}".strip(".")
        for part, module in parts
        for name, child in module.named_modules()
        if isinstance(child, AdapterLayer)
    ]
    if there:
        raise LifecycleError(
            "These layers have adapters that another module has the record of, or that are frozen:"
            + itemize(there, 5)
            + "\nOthers would take their place, or train them too. To train them on, load "
            "them by load_adapter(..., is_trainable=True), or make the module that they were added "
            "to a submodule as a whole; else fold them into the base first, by "
            "lightning_peft.merge and unload of that module."
        )
