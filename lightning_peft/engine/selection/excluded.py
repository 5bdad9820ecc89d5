"""Matching of ``exclude_modules``.

As in PEFT, an entry leaves out the layer that it names, and not what is inside of a module.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_peft.engine.layers.expert_weights import parameter_name
from lightning_peft.engine.layers.kinds import ADAPTABLE
from lightning_peft.engine.selection.parts import inside

log = logging.getLogger(__name__)


def is_named(wanted: str | Iterable[str] | None, names: Iterable[str]) -> bool:
    """Whether an expression, or a list of last steps, means one of ``names``; PEFT's rule."""
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, name) for name in names)
    return any(f".{name}".endswith(f".{entry}") for name in names for entry in wanted or ())


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
