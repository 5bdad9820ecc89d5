"""Key names of adapter files as expected by PEFT, and their limits.

PEFT takes an entry of ``modules_to_save`` for the end of a name, not for its last steps: ``"fc"``
is ``c_fc`` too. And it leaves layers without an adapter whose name an entry matches as a regular
expression.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lightning_peft.engine.selection.targets import all_names


def saved_entries(part: nn.Module, saved: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Returns the entries of ``modules_to_save`` by which PEFT finds the modules ``saved``.

    A module that PEFT would take for others too gets none. Its values are in the file all the
    same, and PEFT puts them into the base.
    """
    wanted, adapted, names = set(saved), set(targets), all_names(part)
    keys = [known for name in names for known in names[name]]
    keys += [f"{target}.{added}" for target in adapted for added in _added(part, target)]
    # One that has two names would get a copy under each.
    meant = {name for name in wanted if len(names[name]) == 1}
    entries = []
    for name in sorted(meant, key=list(names).index):
        clear = (e for e in _candidates(name) if not _means_others(e, meant, keys, adapted))
        entries += [entry for entry in [next(clear, None)] if entry is not None]
    return entries


def _added(part: nn.Module, target: str) -> list[str]:
    """Names that PEFT adds below a layer that it wraps, on loading a file."""
    children = part.get_submodule(target).named_children()
    held = [name for name, child in children if isinstance(child, nn.ModuleDict) and len(child)]
    return ["base_layer", *(f"{name}.default" for name in held)]


def _candidates(name: str) -> list[str]:
    steps = name.split(".")
    ends = [".".join(steps[-count:]) for count in range(1, len(steps) + 1)]
    return [name, *(f".{end}" for end in reversed(ends[:-1]))]


# PEFT takes an entry of `modules_to_save` for the end of a name (`fc` is `c_fc` too).
def _means_others(entry: str, meant: set[str], keys: list[str], adapted: set[str]) -> bool:
    if any(key.endswith(entry) and key not in meant for key in keys):
        return True
    # PEFT's own expression, in which the entry is not escaped.
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", key) for key in adapted)


def replaced_under_one_name(part: nn.Module, targets: Iterable[str]) -> list[str]:
    """Returns a sentence for each adapted layer that PEFT would not find under all its names."""
    names = all_names(part)
    return [
        f"{target} is also called {', '.join(names[target][1:])}, and PEFT would replace it under "
        "one name"
        for target in targets
        if len(names.get(target, ())) > 1
    ]
