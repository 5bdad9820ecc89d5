"""Between a recipe and what stands in the form: values to text and back, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from gradio_app.errors import Refused
from gradio_app.guards import shortened
from gradio_app.recipe.content import MISSING, class_name, value_at, with_value
from gradio_app.recipe.fields import BY_PATH, FIELDS, Field
from gradio_app.recipe.parsing import parsed
from gradio_app.recipe.presets import TASKS, Task

LONGEST_TEXT = 10_000


def task_of(content: Mapping[str, Any]) -> Task | None:
    """Returns the task that a recipe is for; ``None`` for a class that none has."""
    name = class_name(content.get("model"))
    found = [task for task in TASKS if task.module == name]
    if name == "PreferenceTuning":
        loss = value_at(content, "model.init_args.loss", "dpo")
        found = [task for task in found if task.name == loss] or found
    if name == "Seq2SeqLM" and value_at(content, "data.init_args.prefix", "").startswith("transl"):
        found = [task for task in found if task.name == "translation"]
    return found[0] if found else None


def method_of(content: Mapping[str, Any]) -> str:
    """Returns ``"lora"`` or ``"qlora"``."""
    strategy = value_at(content, "trainer.strategy", None)
    name = strategy if isinstance(strategy, str) else class_name(strategy)
    return "qlora" if name.lower().startswith("qlora") else "lora"


def applies(field: Field, content: Mapping[str, Any]) -> bool:
    """Says whether a recipe can have the setting."""
    task = task_of(content)
    known = task is not None and task.name in field.tasks
    return known and field.method in (None, method_of(content))


def default_of(field: Field, content: Mapping[str, Any]) -> Any:
    """Returns the value of a setting where the recipe does not have it."""
    task = task_of(content)
    names = (method_of(content), task.name if task else "")
    return next((value for name, value in field.others if name in names), field.default)


def shown(field: Field, content: Mapping[str, Any]) -> Any:
    """Returns what the form shows of a setting: a bool for a switch, else text."""
    value = value_at(content, field.path, default_of(field, content))
    if field.kind == "switch":
        return value if isinstance(value, bool) else value is not None
    # A run writes 32.0 where 32 was typed; of batches, 1.0 are all, and 1 is one.
    whole = isinstance(value, float) and value.is_integer() and field.kind != "batches"
    return text_of(int(value) if whole else value)


def text_of(value: Any) -> str:
    """Returns a value as it is typed."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list):
        return ", ".join(map(text_of, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {text_of(inner)}" for key, inner in value.items())
    return str(value)


def _number(value: float) -> str:
    text = repr(value)
    if value and math.isfinite(value) and (abs(value) < 1e-2 or abs(value) >= 1e7):
        # 2e-4, as the field writes it, and not 0.0002.
        mantissa, _, exponent = f"{value:.6e}".partition("e")
        short = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        text = short if float(short) == value else text
    return text


def read(field: Field, given: object) -> Any:
    """Returns the value that was typed for a setting.

    Raises:
        Refused: If it can be none.
    """
    if field.kind == "switch":
        if not isinstance(given, bool):
            raise Refused("checks.switch", value=shortened(given))
        return given
    if not isinstance(given, (str, int, float, type(None))):
        raise Refused("checks.at_value", where=field.key, value=shortened(given))
    text = given.strip() if isinstance(given, str) else text_of(given)
    if field.kind == "choice":
        return _choice(field, text)
    if not text:
        if field.optional or field.default in (None, ""):
            return None if field.default is None else field.default
        raise Refused("checks.needed")
    if len(text) > LONGEST_TEXT:
        raise Refused("checks.long_text", most=LONGEST_TEXT)
    readers = {"words": _words, "numbers": _numbers, "pairs": _pairs}
    if field.kind in readers:
        return readers[field.kind](text)
    return text if field.kind == "text" else _in_range(field, text)


def _choice(field: Field, text: str) -> Any:
    for choice in field.choices:
        if text_of(choice) == text:
            return choice
    known = ", ".join(text_of(choice) or "-" for choice in field.choices)
    raise Refused("checks.choice", value=shortened(text), known=known)


def _in_range(field: Field, text: str) -> int | float:
    whole = field.kind == "integer"
    number = _parsed_number(text)
    if number is None or whole and number != int(number):
        raise Refused("checks.integer" if whole else "checks.number", value=shortened(text))
    too_small = field.least is not None and (
        number <= field.least if field.above else number < field.least
    )
    if too_small or field.most is not None and number > field.most:
        least = text_of(field.least) if field.least is not None else "-"
        most = text_of(field.most) if field.most is not None else "-"
        raise Refused("checks.range", value=shortened(text), least=least, most=most)
    if whole:
        return int(number)
    # Of batches, a whole number is a count, and a fraction a share.
    counted = field.kind == "batches" and "." not in text and "e" not in text.lower()
    return int(number) if counted else float(number)


def _parsed_number(text: str) -> float | None:
    try:
        number = float(text.replace(",", ".") if text.count(",") == 1 else text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _words(text: str) -> list[str] | str:
    words = [word.strip() for word in text.split(",") if word.strip()]
    # One word may be "all-linear", or a regular expression.
    return words[0] if len(words) == 1 and not words[0].isidentifier() else words


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise Refused("checks.numbers", value=shortened(text)) from None


def _pairs(text: str) -> dict[str, int]:
    inside = text if text.startswith("{") else f"{{{text}}}"
    try:
        found = parsed(inside)
        if not all(isinstance(value, int) and value > 0 for value in found.values()):
            raise Refused("checks.pairs", value=shortened(text))
    except Refused:
        raise Refused("checks.pairs", value=shortened(text)) from None
    return found


def with_fields(
    content: dict[str, Any], given: Mapping[str, object]
) -> tuple[dict[str, Any], dict[str, Refused]]:
    """Returns the recipe with what stands in the form, and what of that cannot be.

    A key is only written where it says something else than before: a recipe that is opened and left
    as it is stays as it is.

    Args:
        content: The recipe that the form was filled from.
        given: What stands in the form, by path.
    """
    problems: dict[str, Refused] = {}
    for field in FIELDS:
        if field.path not in given or not applies(field, content):
            continue
        typed = given[field.path]
        if typed == shown(field, content) or typed is None and shown(field, content) == "":
            continue
        try:
            value = read(field, typed)
        except Refused as refused:
            problems[field.path] = refused
            continue
        content = with_value(content, field.path, value)
    return content, problems


def changed(content: Mapping[str, Any], since: Mapping[str, Any]) -> list[str]:
    """Returns the paths of the settings in which a recipe differs from what it was made of."""
    return [
        field.path
        for field in FIELDS
        if applies(field, content) and shown(field, content) != shown(field, since)
    ]


def followed(
    since: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what a recipe was made of, with all that a choice has changed in the recipe.

    Whoever chooses a model has not changed the learning rate that goes with it.

    Args:
        since: What the recipe was made of.
        before: The recipe before the choice.
        after: The recipe after it.
    """
    strategy = "trainer.strategy.class_path"
    since = with_value(since, strategy, value_at(after, strategy, MISSING))
    for field in FIELDS:
        if shown(field, before) != shown(field, after):
            since = with_value(since, field.path, value_at(after, field.path, MISSING))
    return since


def reset(content: dict[str, Any], since: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns a recipe in which a setting is again what it was.

    Raises:
        Refused: If there is no such setting.
    """
    if path not in BY_PATH:
        raise Refused("checks.unknown", where=shortened(path))
    return with_value(content, path, value_at(since, path, MISSING))


def as_json(value: Any) -> str:
    """Returns a value as it stands in a command."""
    return json.dumps(value, ensure_ascii=False)
