"""Resolution of ``trainable_token_indices`` to embedding rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.layers.mixin import LayerMixin
from lightning_peft.engine.layers.tokens import TokenLayer
from lightning_peft.engine.selection.parts import (
    base_modules,
    inside,
    matches_suffix,
    parameter_holders,
)
from lightning_peft.errors import ConfigError, itemize

FIELD = "trainable_token_indices"
_KINDS = (nn.Embedding, nn.Linear)


@dataclass
class Tokens:
    """Rows of a layer that train.

    Attributes:
        rows: Their numbers, in the order of PEFT's files.
        tied: Names of the layers in the part that share the weight.
    """

    rows: list[int]
    tied: list[str]


def requested_tokens(
    module: nn.Module, parts: Mapping[str, nn.Module], config: Any
) -> dict[str, dict[str, Tokens]]:
    """Returns the rows that train, by part and layer.

    As in PEFT a list means the input embeddings, and a name every layer whose name ends with it.
    Layers with one weight have one set of rows.
    """
    asked = getattr(config, FIELD, None)
    found: dict[str, dict[str, Tokens]] = {name: {} for name in parts}
    if not asked:
        return found
    problems: list[str] = []
    named = asked if isinstance(asked, Mapping) else {None: asked}
    holders = parameter_holders(module)
    matched = set()
    for part_name, part in parts.items():
        for entry, rows in named.items():
            for name, layer in _meant(part, entry):
                matched.add(entry)
                problem = _problem(layer, list(rows))
                if problem:
                    problems.append(f"{name}: {problem}")
                else:
                    problems += _add(found[part_name], part, name, list(rows))
        problems += [
            f"{name} shares its weight with {other or 'the module'} outside of what is adapted"
            for name in found[part_name]
            for other in holders[id(part.get_submodule(name)._parameters["weight"])]
            if not inside(other, [part_name])
        ]
    problems += [
        f"{entry!r} matches no layer" if entry else "there are no input embeddings: name the layer"
        for entry in named
        if entry not in matched
    ]
    if problems:
        raise ConfigError(f"{FIELD}={asked!r} does not fit:" + itemize(problems))
    return found


def _meant(part: Any, entry: str | None) -> Iterator[tuple[str, nn.Module]]:
    known = base_modules(part)
    if entry is not None:
        yield from ((n, x) for n, x in known.items() if matches_suffix(entry, n))
        return
    try:
        layer = part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        layer = None
    yield from (
        (n, x)
        for n, x in known.items()
        if x is layer or (layer is None and n.rpartition(".")[2] == "embed_tokens")
    )


def _problem(layer: Any, rows: list[int]) -> str | None:
    kind = type(layer).__name__
    weight = getattr(layer, "_parameters", {}).get("weight")
    if not isinstance(layer, _KINDS) or weight is None or not weight.is_floating_point():
        return f"a {kind} has no rows for tokens, or they are quantized. Name an embedding"
    if isinstance(layer, AdapterLayer) and not isinstance(layer, TokenLayer):
        return "it has an adapter already"
    if getattr(layer, "max_norm", None) is not None:
        return f"max_norm={layer.max_norm} makes the embedding rewrite its frozen weight"
    if getattr(layer, "scale_grad_by_freq", False):
        return "scale_grad_by_freq counts tokens over the whole embedding. Switch it off"
    beyond = [row for row in rows if row >= weight.shape[0]]
    if beyond:
        return (
            f"tokens {beyond[:5]} of a vocabulary of {weight.shape[0]}; call "
            f"model.resize_token_embeddings({max(rows) + 1}) first, as was done before training"
        )
    return None


def _add(found: dict[str, Tokens], part: nn.Module, name: str, rows: list[int]) -> list[str]:
    """Notes rows of a layer, or of the one with the same weight that was noted before."""
    weight = part.get_submodule(name)._parameters["weight"]
    tied = [n for n in parameter_holders(part)[id(weight)] if n != name]
    for other, tokens in found.items():
        if other == name or other in tied:
            same = tokens.rows == rows
            return [] if same else [f"{name} and {other} share one weight, and train other rows"]
    strange = [n for n in tied if not isinstance(part.get_submodule(n), _KINDS)]
    if strange:
        return [f"{name} shares its weight with {', '.join(strange)}, which cannot train rows"]
    found[name] = Tokens(rows, tied)
    return []


def conflicts(
    part: nn.Module, tokens: Mapping[str, Tokens], adapted: Collection[str], others: list[str]
) -> list[str]:
    """Returns sentences on rows of layers that train in another way.

    ``others`` names heads and modules that are trained in full, and layers to quantize.
    """
    problems = []
    for name, held in tokens.items():
        for one in (name, *held.tied):
            layer: Any = part.get_submodule(one)
            if one in adapted:
                problems.append(f"{one} gets an adapter by target_modules too")
            elif inside(one, others):
                problems.append(f"{one} is trained in full, or quantized")
            elif isinstance(layer, AdapterLayer) and not isinstance(layer, TokenLayer):
                problems.append(f"{one} has an adapter already")
    problems += [
        f"{name} has trained rows of {FIELD}, and no room for another adapter"
        for name in adapted
        if isinstance(layer := part.get_submodule(name), LayerMixin)
        and hasattr(layer, "token_layer")
    ]
    return problems
