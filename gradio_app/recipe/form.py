"""Conversion between recipe values and form inputs, with validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradio_app.errors import UserError
from gradio_app.guards import shortened
from gradio_app.recipe.content import MISSING, class_name, value_at, with_value
from gradio_app.recipe.fields import BY_PATH, FIELDS, Field
from gradio_app.recipe.yaml_text import parse_yaml
from lightning_peft.task_registry import task_of_config

LONGEST_TEXT = 10_000
_REWARD_WEIGHTS = "model.init_args.reward_weights"


def method_of(content: Mapping[str, Any]) -> str:
    """Returns ``"lora"`` or ``"qlora"``."""
    strategy = value_at(content, "trainer.strategy", None)
    name = strategy if isinstance(strategy, str) else class_name(strategy)
    return "qlora" if name.lower().startswith("qlora") else "lora"


def applies(field: Field, content: Mapping[str, Any]) -> bool:
    """Whether a recipe can have the setting."""
    task = task_of_config(content)
    known = task is not None and field.is_for(task)
    return known and field.method in (None, method_of(content))


def default_of(field: Field, content: Mapping[str, Any]) -> Any:
    """Returns the value of a setting where the recipe does not have it."""
    task = task_of_config(content)
    own = dict(task.defaults if task else ())
    return own.get(field.path, dict(field.defaults).get(method_of(content), field.default))


def display_value(field: Field, content: Mapping[str, Any]) -> Any:
    """Returns the form's value of a setting: a bool for a switch, a list of several, else text."""
    value = value_at(content, field.path, default_of(field, content))
    if field.kind == "several":
        return [one for one in value if one in field.choices] if isinstance(value, list) else []
    if field.kind == "switch":
        return value if isinstance(value, bool) else value is not None
    # A run writes 32.0 where 32 was typed; of batches, 1.0 are all, and 1 is one.
    whole = isinstance(value, float) and value.is_integer() and field.kind != "batches"
    return format_value(int(value) if whole else value)


def format_value(value: Any) -> str:
    """Returns a value as it is typed."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _format_number(value)
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {format_value(inner)}" for key, inner in value.items())
    return str(value)


def _format_number(value: float) -> str:
    text = repr(value)
    if value and math.isfinite(value) and (abs(value) < 1e-2 or abs(value) >= 1e7):
        # 2e-4, as the field writes it, and not 0.0002.
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        short = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        text = short if float(short) == value else text
    return text


def parse_value(field: Field, given: object) -> Any:
    """Returns the value that was typed for a setting. Raises UserError if it can be none."""
    if field.kind == "switch":
        if not isinstance(given, bool):
            raise UserError("checks.switch", value=shortened(given))
        return given
    if field.kind == "several":
        return _parse_several(field, given)
    if not isinstance(given, (str, int, float, type(None))):
        raise UserError("checks.at_value", where=field.key, value=shortened(given))
    text = given.strip() if isinstance(given, str) else format_value(given)
    if field.kind == "choice":
        return _parse_choice(field, text)
    if not text:
        if field.optional or field.default in (None, ""):
            return None if field.default is None else field.default
        raise UserError("checks.needed")
    if len(text) > LONGEST_TEXT:
        raise UserError("checks.long_text", most=LONGEST_TEXT)
    readers = {"words": _parse_words, "numbers": _parse_numbers, "pairs": _parse_pairs}
    if field.kind in readers:
        return readers[field.kind](text)
    return text if field.kind == "text" else _parse_number(field, text)


def _parse_choice(field: Field, text: str) -> Any:
    for choice in field.choices:
        if format_value(choice) == text:
            return choice
    known = ", ".join(format_value(choice) or "-" for choice in field.choices)
    raise UserError("checks.choice", value=shortened(text), known=known)


def _parse_several(field: Field, given: object) -> list[Any]:
    values = given if isinstance(given, list) else [given]
    unknown = [one for one in values if one not in field.choices]
    if unknown:
        known = ", ".join(map(format_value, field.choices))
        raise UserError("checks.choice", value=shortened(unknown[0]), known=known)
    if not values:
        raise UserError("checks.needed")
    # In one order, whichever was ticked first.
    return [one for one in field.choices if one in values]


def _parse_number(field: Field, text: str) -> int | float:
    whole = field.kind == "integer"
    number = _to_float(text)
    if number is None or whole and number != int(number):
        raise UserError("checks.integer" if whole else "checks.number", value=shortened(text))
    too_small = (field.ge is not None and number < field.ge) or (
        field.gt is not None and number <= field.gt
    )
    if too_small or field.le is not None and number > field.le:
        least = format_value(field.gt if field.ge is None else field.ge) or "-"
        most = format_value(field.le) or "-"
        raise UserError("checks.range", value=shortened(text), least=least, most=most)
    if whole:
        return int(number)
    # Of batches, a whole number is a count, and a fraction a share.
    counted = field.kind == "batches" and "." not in text and "e" not in text.lower()
    return int(number) if counted else float(number)


def _to_float(text: str) -> float | None:
    try:
        number = float(text.replace(",", ".") if text.count(",") == 1 else text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parse_words(text: str) -> list[str] | str:
    words = [word.strip() for word in text.split(",") if word.strip()]
    # One word may be "all-linear", or a regular expression.
    return words[0] if len(words) == 1 and not words[0].isidentifier() else words


def _parse_numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise UserError("checks.numbers", value=shortened(text)) from None


def _parse_pairs(text: str) -> dict[str, int]:
    inside = text if text.startswith("{") else f"{{{text}}}"
    try:
        found = parse_yaml(inside)
        if not all(isinstance(value, int) and value > 0 for value in found.values()):
            raise UserError("checks.pairs", value=shortened(text))
    except UserError:
        raise UserError("checks.pairs", value=shortened(text)) from None
    return found


def with_typed(content: dict[str, Any], field: Field, typed: object) -> dict[str, Any]:
    """Returns a recipe with what was typed for a setting; the same object where that is its value.

    So a recipe that is opened and left as it is stays as it is. Raises UserError if it can be none.
    """
    shown = display_value(field, content)
    same = typed == shown or typed is None and shown == ""
    if field.kind == "several" and isinstance(typed, list):
        same = len(typed) == len(shown) and all(one in shown for one in typed)
    if same or not applies(field, content):
        return content
    value = parse_value(field, typed)
    if field.kind == "several":
        if value_at(content, _REWARD_WEIGHTS, None):
            # They belong to the rewards by their places, and the form does not show them.
            raise UserError("checks.reward_weights")
        # Those that the form does not know, such as a function of one's own, stay.
        before = value_at(content, field.path, None)
        if isinstance(before, list):
            value += [one for one in before if one not in field.choices]
    return with_value(content, field.path, value)


def changed_paths(content: Mapping[str, Any], since: Mapping[str, Any]) -> list[str]:
    """Returns the paths of the settings in which a recipe differs from what it was made of."""
    return [
        field.path
        for field in FIELDS
        if applies(field, content) and display_value(field, content) != display_value(field, since)
    ]


def rebase_defaults(
    since: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the origin of a recipe, with all that a choice has changed in it.

    Whoever chooses a model has not changed the learning rate that goes with it.
    """
    strategy = "trainer.strategy.class_path"
    since = with_value(since, strategy, value_at(after, strategy, MISSING))
    for field in FIELDS:
        if display_value(field, before) != display_value(field, after):
            since = with_value(since, field.path, value_at(after, field.path, MISSING))
    return since


def reset_field(content: dict[str, Any], since: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns a recipe in which a setting is again what it was."""
    if path not in BY_PATH:
        raise UserError("checks.unknown", where=shortened(path))
    return with_value(content, path, value_at(since, path, MISSING))
