"""Matching of ``target_modules``, with suggestions for misspelled names.

The matching rule is PEFT's. What PEFT lets through is refused here: names that match nothing, and
matches on containers. What PEFT refuses, ``layers_to_transform`` with ``"all-linear"``, works.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from peft import PeftConfig
from torch import nn
from torch.jit import ScriptModule

from lightning_peft.compat.peft import check_target_module_exists
from lightning_peft.engine.layers.expert_weights import parameter_name
from lightning_peft.engine.layers.kinds import ADAPTABLE, CONVOLUTION_LIKE, LINEAR_LIKE, is_router
from lightning_peft.engine.methods.registry import in_place_method
from lightning_peft.engine.selection.parameters import (
    adaptable_weights,
    expert_layers,
    experts_named_as_layers,
    is_named,
    skip_names,
    warn_of_unused_exclusions,
)
from lightning_peft.engine.selection.parts import (
    NO_EXCLUSIONS,
    Exclusions,
    base_modules,
    find_heads,
    inside,
    matches_suffix,
    output_embeddings,
    tied_layers,
)
from lightning_peft.engine.selection.rows import Rows, requested_rows, without_rows
from lightning_peft.engine.selection.unsupported_layers import self_modified_layers
from lightning_peft.errors import TargetModulesError, itemize

ALL_LINEAR = "all-linear"
PATTERN_FIELDS = (
    "rank_pattern",
    "alpha_pattern",
    "block_size_pattern",
    "lambda_pattern",
    "n_frequency_pattern",
)
Parts = Mapping[str, nn.Module]


def is_all_linear(target_modules: Any) -> bool:
    """Whether ``target_modules`` is the word for all linear layers."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def resolve_targets(
    parts: Parts, config: PeftConfig, exclusions: Exclusions = NO_EXCLUSIONS
) -> dict[str, list[str]]:
    """Returns the names of the layers that ``config`` adapts, by part, in module order.

    A layer registered under several names is meant by any of them, and listed by the first. With
    several parts, an entry has to match in one of them.

    Raises:
        TargetModulesError: If a part gets no adapter, or an entry of ``target_modules``,
            ``exclude_modules``, ``rank_pattern`` or ``alpha_pattern`` matches nothing; all of
            them at once.
    """
    config = without_rows(config)
    wanted = getattr(config, "target_modules", None)
    excluded = getattr(config, "exclude_modules", None)
    if wanted is None or is_all_linear(wanted):
        found = {name: _all_linear(part, config, exclusions) for name, part in parts.items()}
        problems = []
    else:
        # PEFT takes an empty list for none, where parameters are named.
        found = {
            name: _matching(part, config, exclusions) if wanted else []
            for name, part in parts.items()
        }
        problems = _unmatched(
            "target_modules", wanted, parts, partial(_layers, left=exclusions.left)
        )
        for part in parts.values() if problems else ():
            problems += experts_named_as_layers(wanted, part, all_names(part))
    problems += _add_parameters(found, parts, config, exclusions)
    problems += _unmatched("exclude_modules", excluded, parts, base_modules)
    problems += _unmatched_patterns(config, found)
    if not problems:
        problems = [
            f"nothing to adapt in {name or type(part).__name__}: {_layer_types(part)}. Heads, and "
            "layers that `exclude_modules` or `modules_to_save` name or `layers_to_transform` "
            f"leaves out, get no adapter{_recurrent_note(part)}. Name layers in "
            "`target_modules`, or the submodules that are meant in `adapt`"
            for name, part in parts.items()
            if not found[name]
        ]
    if problems:
        raise TargetModulesError(
            f"The names do not fit {_display_name(parts)}:"
            + itemize(problems)
            + _note_on_left(parts, exclusions)
        )
    for name, part in parts.items():
        warn_of_unused_exclusions(part, all_names(part), found[name], excluded)
    return found


def rows_of(
    part: nn.Module, targets: Iterable[str], config: PeftConfig
) -> tuple[dict[str, Rows], list[str]]:
    """Returns the rows that ``config`` adapts of the layers ``targets``, where it is not all.

    See :func:`lightning_peft.engine.selection.rows.requested_rows`.
    """
    return requested_rows(part, targets, all_names(part), config, in_place_method(config))


def _add_parameters(
    found: dict[str, list[str]], parts: Parts, config: PeftConfig, exclusions: Exclusions
) -> list[str]:
    """Adds the layers whose weights ``target_parameters`` names to ``found``, in module order.

    Returns:
        A problem for every entry that matches no weight of a layer or of experts in any part.
    """
    entries = sorted(getattr(config, "target_parameters", None) or [])
    matched: set[str] = set()
    known: list[str] = []
    for name, part in parts.items() if entries else ():
        weights = adaptable_weights(base_modules(part), all_names(part), exclusions.left)
        known += weights
        hits = {e: [w for w in weights if matches_suffix(e, w)] for e in entries}
        matched |= {entry for entry, names in hits.items() if names}
        layers = {*found[name], *(weights[w] for names in hits.values() for w in names)}
        found[name] = [layer for layer in base_modules(part) if layer in layers]
    return [
        f"{entry!r} of target_parameters matches no weight of a layer, and none of experts that "
        f"transformers runs by its own code{similar_layer_names(entry, known)}"
        for entry in entries
        if entry not in matched
    ]


def _note_on_left(parts: Parts, exclusions: Exclusions) -> str:
    """Returns a sentence on the submodules that no name can match."""
    names: list[str] = []
    for root, part in parts.items():
        for name, child in part.named_modules():
            own = f"{root}.{name}".strip(".")
            if child in exclusions.left and not inside(own, names):
                names.append(own)
    if not names:
        return ""
    return (
        f"\nNothing is looked for in {', '.join(names)}: metrics, losses and what the module froze "
        "while other layers train stay as they are. Name them in `adapt` if they are meant."
    )


def resolve_saved_modules(
    parts: Parts,
    wanted: Iterable[str],
    targets: Mapping[str, list[str]],
    exclusions: Exclusions = NO_EXCLUSIONS,
) -> dict[str, list[str]]:
    """Returns the names of the submodules that ``modules_to_save`` means, by part.

    As in PEFT, an entry means every name that ends with it: ``"norm"`` is ``input_layernorm`` too.
    Where PEFT would raise an error since such a module has an adapter, the adapter is kept. What
    stays as it is is meant only by entries that mean nothing else.
    """
    entries = list(wanted)
    check_names_match("modules_to_save", entries, parts, _ends_with)
    found = {}
    for part_name, part in parts.items():
        adapted, modules, names = targets[part_name], base_modules(part), all_names(part)
        hits: set[str] = set()
        for entry in entries:
            mine = {n for n, known in names.items() if any(_ends_with(entry, a) for a in known)}
            hits |= {name for name in mine if modules[name] not in exclusions.left} or mine
        free = [
            name
            for name in names
            if name in hits
            and not inside(name, adapted)
            and not any(inside(target, [name]) for target in adapted)
        ]
        found[part_name] = [n for n in free if not inside(n, [up for up in free if up != n])]
    return found


def check_names_match(
    argument: str,
    wanted: Iterable[str],
    parts: Parts,
    rule: Callable[[str, str], bool] | None = None,
) -> None:
    """Refuses names of submodules that match nothing."""
    problems = _unmatched(argument, list(wanted), parts, base_modules, rule or matches_suffix)
    if problems:
        raise TargetModulesError(
            f"The names do not fit {_display_name(parts)}:" + itemize(problems)
        )


def _display_name(parts: Parts) -> str:
    return ", ".join(name or type(part).__name__ for name, part in parts.items())


def _layers(part: nn.Module, left: frozenset[nn.Module] = frozenset()) -> dict[str, list[str]]:
    """Returns all names of every layer with parameters that is not left, by its first name."""
    modules = base_modules(part)
    return {
        name: known
        for name, known in all_names(part).items()
        if modules[name] not in left
        # TorchScript runs what it has compiled, without adapters.
        and not isinstance(modules[name], ScriptModule)
        and next(modules[name].parameters(recurse=False), None) is not None
    }


def all_names(part: nn.Module) -> dict[str, list[str]]:
    """Returns all names of every submodule, by its first one, without those of adapters."""
    first = {id(child): name for name, child in base_modules(part).items() if name}
    names: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, child in part.named_modules(remove_duplicate=False):
        if id(child) in first:
            names[first[id(child)]].append(name)
    return names


_NAMES = {cls.__name__ for cls in ADAPTABLE}


def _layer_types(part: nn.Module) -> str:
    classes = {type(part.get_submodule(name)) for name in _layers(part)}
    # Other packages have a `Linear` of their own, which does not derive from torch's.
    kinds = sorted(
        f"{cls.__module__}.{cls.__qualname__}"
        if cls.__name__ in _NAMES and not issubclass(cls, ADAPTABLE)
        else cls.__name__
        for cls in classes
    )
    return "its layers are of the kinds " + (", ".join(kinds) or "none with parameters")


def _recurrent_note(part: nn.Module) -> str:
    if not any(isinstance(child, nn.RNNBase) for child in part.modules()):
        return ""
    return (
        ", and recurrent layers only get one by name: give it in `target_modules`, or train in "
        "full, with Lightning's own strategies"
    )


def _ends_with(entry: str, name: str) -> bool:
    return bool(entry) and name.endswith(entry)


def _matches(config: PeftConfig, name: str) -> bool:
    found = check_target_module_exists(config, name)
    # PEFT answers "excluded" with an object that is neither true nor false on purpose.
    return found is True or isinstance(found, re.Match)


def _matching(part: nn.Module, config: PeftConfig, exclusions: Exclusions) -> list[str]:
    layers = _layers(part, exclusions.left)
    return [name for name, known in layers.items() if any(_matches(config, a) for a in known)]


def _all_linear(part: nn.Module, config: PeftConfig, exclusions: Exclusions) -> list[str]:
    """Returns the linear layers besides heads; where there are none, the convolutions."""
    modules, heads, tied = base_modules(part), list(find_heads(part, exclusions)), tied_layers(part)
    output, rewritten = output_embeddings(part), self_modified_layers(part)
    eligible = [
        name
        for name in _layers(part, exclusions.left)
        if modules[name] is not output
        and modules[name] not in exclusions.unused
        and name not in tied
        and name not in rewritten
        and not is_router(modules[name])
        and not inside(name, heads)
    ]
    linear = [name for name in eligible if isinstance(modules[name], LINEAR_LIKE)]
    linear += expert_layers(modules, config, exclusions)
    candidates = linear or [name for name in eligible if _is_ungrouped(modules[name])]
    # By last name, so that PEFT's rule for `layers_to_transform` and `exclude_modules` applies.
    by_suffix: Any = copy.copy(config)
    by_suffix.target_modules = {parameter_name(name).rpartition(".")[2] for name in candidates}
    chosen = {
        name
        for name in candidates
        if _matches(by_suffix, parameter_name(name))
        and not is_named(getattr(config, "exclude_modules", None), skip_names(name))
    }
    return [name for name in modules if name in chosen]


def _is_ungrouped(layer: Any) -> bool:
    # Depthwise kernels are small, and few ranks fit their groups.
    return isinstance(layer, CONVOLUTION_LIKE) and layer.groups == 1


def _unmatched(
    argument: str,
    wanted: Any,
    parts: Parts,
    names_of: Any,
    rule: Callable[[str, str], bool] = matches_suffix,
) -> list[str]:
    """Returns a problem for every entry that matches no name in any part."""
    names = []
    for part in parts.values():
        aliases = _layers(part)
        names += [
            parameter_name(alias)
            for name in names_of(part)
            for alias in aliases.get(name, [name])
            if alias
        ]
    if isinstance(wanted, str):
        found = any(re.fullmatch(wanted, name) for name in names)
        return (
            []
            if found
            else [f"{argument}={wanted!r} matches nothing{similar_layer_names(wanted, names)}"]
        )
    return [
        f"{entry!r} of {argument} matches nothing{similar_layer_names(entry, names)}"
        for entry in sorted(wanted or [])
        if not any(rule(entry, name) for name in names)
    ]


def _unmatched_patterns(config: PeftConfig, found: Mapping[str, list[str]]) -> list[str]:
    targets = [parameter_name(name) for names in found.values() for name in names]
    return [
        f"{key!r} of {argument} matches no adapted layer{similar_layer_names(key, targets)}"
        for argument in PATTERN_FIELDS
        for key, value in (getattr(config, argument, None) or {}).items()
        if not patterns_for(targets, {key: value})
    ]


def patterns_for(targets: Iterable[str], patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of ``rank_pattern`` or ``alpha_pattern`` that match one of ``targets``.

    The others are for another part of the module; PEFT warns of them.
    """
    names = [parameter_name(name) for name in targets]
    return {
        key: value
        for key, value in patterns.items()
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names)
    }


def similar_layer_names(wanted: str, names: Iterable[str]) -> str:
    """Returns ``"; near names: ..."`` with the last names that look like ``wanted``, or ``""``."""
    pool = list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))
    near = difflib.get_close_matches(wanted.rpartition(".")[2], pool, n=3, cutoff=0.5)
    listed = near or sorted(pool)[:8]
    label = "near names" if near else "there are"
    return f"; {label}: {', '.join(listed)}" if listed else ""


def shortest_suffixes(targets: list[str], part: nn.Module) -> list[str] | str:
    """Returns the shortest suffixes that match exactly ``targets`` and nothing else in ``part``.

    The file that other programs read then says ``["q_proj", "v_proj"]`` instead of hundreds of
    full names wherever that is the same. Where even a full name is the end of another one, such as
    ``"0"`` of ``"blocks.0"``, it is a regular expression.
    """
    chosen = set(targets)
    others = {name for name in base_modules(part) if name and name not in chosen}
    taken = {suffix for name in others for suffix in _suffixes(name)}
    shortest = [
        next((suffix for suffix in _suffixes(name) if suffix not in taken), "") for name in targets
    ]
    if "" in shortest:
        return "|".join(re.escape(name) for name in targets)
    return list(dict.fromkeys(shortest))


def _suffixes(name: str) -> list[str]:
    pieces = name.split(".")
    return [".".join(pieces[-count:]) for count in range(1, len(pieces) + 1)]
