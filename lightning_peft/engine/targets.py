"""From what the user calls layers to the exact list of layers, or an error that names near misses.

The matching rule is PEFT's. What PEFT lets through is refused here: names in a list that match
nothing, matches on containers, and ``layers_to_transform`` beside ``"all-linear"``, which PEFT
ignores.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lightning_peft.engine.parts import LINEAR_LIKE, find_heads, output_embeddings
from lightning_peft.errors import TargetModulesError, itemize

ALL_LINEAR = "all-linear"


def resolve_targets(part: nn.Module, config: PeftConfig, part_name: str = "") -> list[str]:
    """Returns the names of the layers of ``part`` that ``config`` adapts, in module order.

    Args:
        part: The adapted submodule.
        config: Any PEFT config with ``target_modules``.
        part_name: How messages call the part.

    Raises:
        TargetModulesError: If nothing matches, or an entry of a list matches nothing.
    """
    where = part_name or type(part).__name__
    wanted = getattr(config, "target_modules", None)
    leaves = {name: child for name, child in part.named_modules() if name and _is_layer(child)}
    if wanted is None or (isinstance(wanted, str) and wanted.lower() == ALL_LINEAR):
        names = _all_linear(part, config, leaves)
        if not names:
            raise TargetModulesError(
                f"{where} has no linear layer to adapt besides its head ({_kinds(leaves)}). Name "
                "the layers in `target_modules`, or the submodule that holds them in `adapt`."
            )
        return names
    names = [name for name in leaves if _matches(config, name)]
    problems = _unmatched(wanted, config, list(leaves), where)
    if problems:
        raise TargetModulesError("`target_modules` does not fit the module:" + itemize(problems))
    return names


def _is_layer(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _kinds(leaves: dict[str, nn.Module]) -> str:
    kinds = sorted({type(child).__name__ for child in leaves.values()})
    return "its layers are: " + (", ".join(kinds) or "none with parameters")


def _matches(config: PeftConfig, name: str) -> bool:
    found = check_target_module_exists(config, name)
    # PEFT answers "excluded" with an object that is neither true nor false on purpose.
    return found is True or isinstance(found, re.Match)


def _all_linear(part: nn.Module, config: PeftConfig, leaves: dict[str, nn.Module]) -> list[str]:
    heads = set(find_heads(part))
    output = output_embeddings(part)
    candidates = [
        name
        for name, child in leaves.items()
        if isinstance(child, LINEAR_LIKE)
        and child is not output
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
    ]
    # By last name, so that PEFT's rule for `layers_to_transform` and `exclude_modules` applies.
    by_suffix = copy.copy(config)
    by_suffix.target_modules = {name.rpartition(".")[2] for name in candidates}  # type: ignore[attr-defined]
    return [name for name in candidates if _matches(by_suffix, name)]


def _unmatched(
    wanted: str | Iterable[str], config: PeftConfig, names: list[str], where: str
) -> list[str]:
    problems = []
    for entry in [wanted] if isinstance(wanted, str) else sorted(wanted):
        single = copy.copy(config)
        single.target_modules = entry if isinstance(wanted, str) else {entry}  # type: ignore[attr-defined]
        if not any(_matches(single, name) for name in names):
            problems.append(f"{entry!r} matches no layer of {where}{near_names(entry, names)}")
    return problems


def near_names(wanted: str, names: Iterable[str]) -> str:
    """Returns ``"; near names: ..."`` with the last names that look like ``wanted``, or ``""``."""
    pool = list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))
    near = difflib.get_close_matches(wanted.rpartition(".")[2], pool, n=3, cutoff=0.5)
    listed = near or sorted(pool)[:8]
    return (
        f"; {'near names' if near else 'its layers are called'}: {', '.join(listed)}"
        if (listed)
        else ""
    )


def resolve_saved_modules(part: nn.Module, wanted: Iterable[str], where: str) -> list[str]:
    """Returns the names of the submodules that ``modules_to_save`` means, by PEFT's suffix rule.

    Raises:
        TargetModulesError: If an entry matches nothing.
    """
    names = [name for name, _ in part.named_modules() if name]
    found: list[str] = []
    problems = []
    for entry in wanted:
        hits = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not hits:
            problems.append(f"{entry!r} matches no submodule of {where}{near_names(entry, names)}")
        found += [name for name in hits if not any(name.startswith(f"{up}.") for up in hits)]
    if problems:
        raise TargetModulesError("`modules_to_save` does not fit the module:" + itemize(problems))
    return list(dict.fromkeys(found))


def compact(targets: list[str], part: nn.Module) -> list[str]:
    """Returns the shortest suffixes that match exactly ``targets`` and nothing else in ``part``.

    The file that other programs read then says ``["q_proj", "v_proj"]`` instead of hundreds of
    full names wherever that is the same.
    """
    chosen = set(targets)
    others = {
        name
        for name, child in part.named_modules()
        if name and name not in chosen and isinstance(child, nn.Module)
    }
    result: dict[str, None] = {}
    for name in targets:
        pieces = name.split(".")
        suffixes = [".".join(pieces[-count:]) for count in range(1, len(pieces) + 1)]
        unique = next(
            (s for s in suffixes if not any(o == s or o.endswith(f".{s}") for o in others)), name
        )
        result[unique] = None
    return list(result)
