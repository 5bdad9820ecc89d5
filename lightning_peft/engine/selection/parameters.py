"""Matching of ``target_parameters`` and ``exclude_modules``, and default expert weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftConfig
from torch import nn

from lightning_peft.engine.layers.expert_weights import (
    ExpertWeight,
    expert_parameters,
    parameter_name,
    run_problem,
)
from lightning_peft.engine.layers.kinds import ADAPTABLE
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.selection.parts import Exclusions, inside, matches_suffix

log = logging.getLogger(__name__)


def adaptable_weights(
    modules: Mapping[str, Any], names: Mapping[str, list[str]], left: frozenset[nn.Module]
) -> dict[str, str]:
    """Returns the layer of every weight that may have an adapter, by all names of the weight."""
    found: dict[str, str] = {}
    for name, known in names.items():
        layer = modules[name]
        if isinstance(layer, ExpertWeight):
            if layer.owner not in left:
                found |= {parameter_name(alias): name for alias in known}
        elif isinstance(layer, ADAPTABLE) and layer not in left:
            found |= {f"{alias}.weight": name for alias in known}
    return found


def expert_layers(
    modules: Mapping[str, Any], config: PeftConfig, exclusions: Exclusions
) -> list[str]:
    """Returns the names of the layers of experts that the word for all linear layers means.

    None where ``target_parameters`` says which, or the settings do not work on them.
    """
    named = getattr(config, "target_parameters", None) is not None
    if named or not method_of(config).takes_experts(config):
        return []
    return [
        name
        for name, layer in modules.items()
        if isinstance(layer, ExpertWeight)
        and layer.owner not in exclusions.left
        and layer.owner not in exclusions.unused
        and run_problem(layer.owner) is None
    ]


def expert_weights(part: nn.Module, names: Mapping[str, list[str]]) -> list[str]:
    """Returns all names of the weights of experts in ``part``, whether they have layers or not."""
    return [
        f"{alias}.{weight}"
        for name, known in names.items()
        for weight in expert_parameters(part.get_submodule(name))
        for alias in known
    ]


def experts_named_as_layers(
    wanted: Any, part: nn.Module, names: Mapping[str, list[str]]
) -> list[str]:
    """Returns a problem where ``target_modules`` names weights of experts, for which it is not."""
    hits = [name for name in expert_weights(part, names) if is_named(wanted, [name])]
    ends = sorted({".".join(name.split(".")[-2:]) for name in hits})
    return [f"weights of experts are named by target_parameters={ends}"] if ends else []


def skip_names(name: str) -> list[str]:
    """Returns the name of a layer; of one of experts, those of its parameter and its experts."""
    parameter = parameter_name(name)
    return [name] if parameter == name else [parameter, name.rpartition(".")[0]]


def is_own_float(weight: nn.Parameter | None, holders: dict[int, list[str]]) -> bool:
    """Whether ``weight`` is dense and not empty, and no layer shares it: it can be replaced."""
    dense = weight is not None and weight.is_floating_point() and weight.numel() > 0
    return dense and len(holders[id(weight)]) == 1


def is_named(wanted: str | Iterable[str] | None, names: Iterable[str]) -> bool:
    """Whether an expression, or a list of last steps, means one of ``names``; PEFT's rule."""
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, name) for name in names)
    return any(matches_suffix(entry, name) for name in names for entry in wanted or ())


def warn_of_unused_exclusions(
    part: nn.Module, names: Mapping[str, list[str]], targets: list[str], excluded: Any
) -> None:
    """Warns of entries that name modules only, whose layers keep their adapters."""
    for entry in [excluded] if isinstance(excluded, str) else sorted(excluded or ()):
        rule = entry if isinstance(excluded, str) else [entry]
        hits = [n for n, known in names.items() if is_named(rule, map(parameter_name, known))]
        adapted = [name for name in targets if inside(name, hits)]
        if adapted and not any(isinstance(part.get_submodule(n), ADAPTABLE) for n in hits):
            log.warning(
                "exclude_modules=%r leaves out no layer: it names %s, and what is inside of a "
                "module keeps its adapters, here %s. Name the layers, or all of them by an "
                "expression that ends in '.*'; experts that target_parameters names are adapted.",
                entry,
                parameter_name(hits[0]),
                parameter_name(adapted[0]),
            )
