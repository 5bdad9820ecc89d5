"""Differences between recipes, setting by setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

# Where a run keeps its files is not a setting.
_NOT_SETTINGS = ("run_dir", "resume")
MISSING = object()


@dataclass(frozen=True)
class Differences:
    """What differs in recipes.

    ``rows`` have a dotted path and the value in each recipe, ``None`` for one without it. ``same``
    counts the other settings; ``unreadable`` are places of recipes that cannot be read.
    """

    rows: tuple[tuple[str, tuple[str | None, ...]], ...]
    same: int
    unreadable: tuple[int, ...]


def differences(recipes: Sequence[str]) -> Differences:
    """Returns the differences of recipes."""
    parsed = [_parse(text) for text in recipes]
    unreadable = tuple(place for place, found in enumerate(parsed) if found is None)
    flat = [flatten_recipe(found or {}) for found in parsed]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows, same = [], 0
    for name in names:
        values = [settings.get(name, MISSING) for settings in flat]
        if all(value == values[0] and type(value) is type(values[0]) for value in values):
            same += 1
        else:
            rows.append((name, tuple(map(_format, values))))
    return Differences(tuple(rows), same, unreadable)


def _parse(text: str) -> dict[str, Any] | None:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return found if isinstance(found, dict) else None


def flatten_recipe(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a recipe by dotted path.

    Callbacks and other lists of classes are named by their class, so that one that was put before
    the others does not make all differ.
    """
    found: dict[str, Any] = {}
    for name, value in content.items():
        if name not in _NOT_SETTINGS:
            _flatten(str(name), value, found)
    return found


def _flatten(path: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            _flatten(f"{path}.{name}", inner, found)
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        for place, inner in enumerate(value):
            cls = str(inner.get("class_path", "")).rpartition(".")[2]
            name = f"{path}.{cls or place}"
            _flatten(name if f"{name}.class_path" not in found else f"{name}-{place}", inner, found)
    else:
        found[path] = value


def _format(value: Any) -> str | None:
    if value is MISSING:
        return None
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    return str(text).removesuffix("\n...\n").strip()
