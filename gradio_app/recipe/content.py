"""Recipes as nested dicts, read and changed by dotted paths.

``trainer.callbacks.StopEarly.init_args.patience`` goes through the list of callbacks to the one of
that class.
"""

from __future__ import annotations

import copy
from typing import Any

from lightning_peft.task_registry import TASKS

# Distinct from a value that is `null`.
MISSING: Any = object()
CALLBACKS = "lightning_peft.tasks"


def class_name(part: object) -> str:
    """Returns the last word of a ``class_path``."""
    found = part.get("class_path", "") if isinstance(part, dict) else ""
    return str(found).rpartition(".")[2]


def is_series(content: dict[str, Any]) -> bool:
    """Whether the data of a recipe is a table of numbers, which has no rows of examples."""
    return class_name(content.get("data")) in {
        spec.data_name for spec in TASKS.values() if spec.reader is None
    }


def value_at(content: Any, path: str, default: Any = MISSING) -> Any:
    """Returns the value at ``path``, or ``default``."""
    found = content
    for name in path.split("."):
        if isinstance(found, list):
            found = next((one for one in found if class_name(one) == name), default)
        elif isinstance(found, dict):
            found = found.get(name, default)
        else:
            return default
        if found is default:
            return default
    return found


def count_at(content: Any, path: str, default: int) -> int | None:
    """Returns the whole number above 0 at ``path``, or ``default``; ``None`` for other values."""
    found = value_at(content, path, default)
    return found if isinstance(found, int) and found > 0 else None


def data_of(content: Any) -> str:
    """Returns where the rows of a recipe are; empty if none were chosen."""
    return str(value_at(content, "data.init_args.data", None) or "")


def with_value(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Returns a copy with ``value`` at ``path``; :data:`MISSING` takes the key away.

    A callback that the recipe does not have stays absent: its arguments mean nothing then.
    """
    changed = copy.deepcopy(content)
    *way, last = path.split(".")
    found: Any = changed
    for name in way:
        if isinstance(found, list):
            found = next((one for one in found if class_name(one) == name), None)
        elif isinstance(found, dict):
            if found.get(name) is None:
                if value is MISSING:
                    return changed
                found[name] = {}
            found = found[name]
        if found is None:
            return changed
    if isinstance(found, list):
        _switch(found, last, bool(value) and value is not MISSING)
    elif isinstance(found, dict):
        if value is MISSING:
            found.pop(last, None)
        else:
            found[last] = copy.deepcopy(value)
    return changed


def _switch(callbacks: list[Any], name: str, on: bool) -> None:
    """Adds the callback of that name, or takes it away."""
    there = [one for one in callbacks if class_name(one) == name]
    if on and not there:
        callbacks.append({"class_path": f"{CALLBACKS}.{name}"})
    elif not on:
        callbacks[:] = [one for one in callbacks if one not in there]


def merge_recipes(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns ``below`` with the values of ``above``, as several ``--config`` are taken.

    Dicts are merged key by key; so are those of classes, where both name the same or ``above``
    names none. Lists and other values of ``above`` replace those below.
    """
    merged = copy.deepcopy(below)
    for key, value in above.items():
        old = merged.get(key)
        another = isinstance(value, dict) and value.get("class_path") not in (
            None,
            old.get("class_path") if isinstance(old, dict) else None,
        )
        if isinstance(value, dict) and isinstance(old, dict) and not another:
            merged[key] = value if key in WHOLE else merge_recipes(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


# Dicts that are one value, and not parts with keys of their own.
WHOLE = {"columns", "config", "hub_splits", "rank_pattern", "alpha_pattern", "processor"}
WHOLE |= {"processor_config"}
