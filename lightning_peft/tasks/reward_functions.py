"""Reward functions by import path, with validated results."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_peft.data.samples import shortened
from lightning_peft.errors import ConfigError, first_line
from lightning_peft.json_equality import equal_values, parse_json

RewardFunction = Callable[..., Sequence[float | None]]
# Shares of the reward of an answer: that it is JSON, its keys, and their values.
_PARSES, _KEYS, _VALUES = 0.2, 0.3, 0.5
_WORD = re.compile(r"\w+")
# What functions get next to the columns.
_ANSWERED = ("prompts", "completions", "completion_ids")


def json_exactness(
    completions: Sequence[Any], expected: Sequence[Any], **columns: Any
) -> list[float]:
    """Returns how near each answer is to the JSON that its row expects, 0 to 1.

    An answer that is JSON and nothing else gets 0.2, its keys up to 0.3 and their values up to 0.5,
    by the share of all keys of both that are right. 1 is an equal value. Where no object is
    expected, an answer that is JSON and not equal gets 0.2.

    Args:
        completions: Texts, or turns of which the last is the answer.
        expected: The column ``expected`` of the rows: JSON, as text or as a value. Text that is not
            JSON stands for itself, and the answer is to be it as a JSON string, in double quotes.
        **columns: Not read.
    """
    return [
        _graded(text_of(one), _parsed(wanted) if isinstance(wanted, str) else wanted)
        for one, wanted in zip(completions, expected, strict=True)
    ]


def word_overlap(
    completions: Sequence[Any], expected: Sequence[str], **columns: Any
) -> list[float]:
    """Returns how many words each answer shares with what its row expects, 0 to 1.

    It is the F1 score of the words without case and order, each counted as often as it occurs.

    Args:
        completions: Texts, or turns of which the last is the answer.
        expected: The column ``expected`` of the rows.
        **columns: Not read.
    """
    found = []
    for one, wanted in zip(completions, expected, strict=True):
        said, asked = (Counter(_WORD.findall(text.lower())) for text in (text_of(one), wanted))
        both = 2 * (said & asked).total()
        found.append(both / max(1, said.total() + asked.total()))
    return found


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def _graded(text: str, expected: Any) -> float:
    try:
        found = parse_json(text)
    except ValueError:
        return 0.0
    if equal_values(found, expected):
        return 1.0
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return _PARSES
    every, both = found.keys() | expected.keys(), found.keys() & expected.keys()
    right = sum(equal_values(found[key], expected[key]) for key in both)
    return _PARSES + (_KEYS * len(both) + _VALUES * right) / max(1, len(every))


def text_of(completion: Any) -> str:
    """Returns the text of an answer, which may be turns."""
    return str(completion if isinstance(completion, str) else completion[-1]["content"])


_BUILT_IN: dict[str, RewardFunction] = {
    "json_exactness": json_exactness,
    "word_overlap": word_overlap,
}
BUILT_IN = tuple(_BUILT_IN)


def load_rewards(paths: Sequence[str]) -> dict[str, RewardFunction]:
    """Returns functions by their paths: a name of ``BUILT_IN``, or ``package.module.name``."""
    found: dict[str, RewardFunction] = {}
    problems = []
    for path in paths:
        module, _, name = path.rpartition(".")
        try:
            function = _BUILT_IN.get(path) or getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            problems.append(f"{path!r} cannot be imported: {first_line(error)}")
            continue
        if not callable(function):
            problems.append(f"{path!r} is {type(function).__name__}, not a function")
        elif not _takes_names(function):
            problems.append(f"{path!r} takes no arguments by name")
        found[path] = function
    if problems:
        raise ConfigError(
            f"rewards={list(paths)!r} cannot be used: {'; '.join(problems)}. Each is a function "
            "by its import path, such as my_rewards.length for length(prompts, completions, "
            f"**columns) in my_rewards.py, or one of {', '.join(_BUILT_IN)}."
        )
    return found


def _takes_names(function: RewardFunction) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    # Functions of C may have none.
    except (TypeError, ValueError):
        return False
    kinds = {one.kind for one in parameters}
    return inspect.Parameter.POSITIONAL_ONLY not in kinds and (
        kinds != {inspect.Parameter.VAR_POSITIONAL}
    )


def check_columns(
    functions: Mapping[str, RewardFunction], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Checks that ``rows`` have the columns that the functions need, before any is judged."""
    built_in = {name: one for name, one in functions.items() if one in _BUILT_IN.values()}
    there = set(_ANSWERED)
    for row in rows:
        there.update(row["columns"])
        for name, function in built_in.items():
            _check_expected(name, function, row)
    absent = {
        name: [key for key in _needed(one) if key not in there] for name, one in functions.items()
    }
    problems = [f"{name!r} needs {', '.join(keys)}" for name, keys in absent.items() if keys]
    if problems:
        raise ConfigError(
            f"The reward {', and '.join(problems)}, and no row has such a column. Add it to the "
            "rows, or give the parameter a default."
        )


def _needed(function: RewardFunction) -> list[str]:
    return [
        key
        for key, one in inspect.signature(function).parameters.items()
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]


def judge(
    functions: Mapping[str, RewardFunction],
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
) -> Tensor:
    """Returns the rewards of answers, ``(answers, functions)``, float32; NaN for ``None``.

    Functions are called as TRL does, with lists of equal length: ``prompts``, ``completions``,
    ``completion_ids`` and the further columns of the rows by their names, ``None`` where a row has
    none; :func:`check_columns` says which are needed.
    """
    names = dict.fromkeys(name for row in rows for name in row["columns"])
    given: dict[str, Any] = {
        **{name: [row["columns"].get(name) for row in rows] for name in names},
        "prompts": [row["prompt"] for row in rows],
        "completions": list(completions),
        "completion_ids": list(completion_ids),
    }
    found = [_called(name, one, given, rows) for name, one in functions.items()]
    return torch.tensor(found, dtype=torch.float32).T


def _called(
    name: str, function: RewardFunction, given: dict[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[float]:
    completions, parameters = given["completions"], inspect.signature(function).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        given = {key: value for key, value in given.items() if key in parameters}
    # A column of other rows.
    nothing: list[Any] = [None] * len(rows)
    given = {**dict.fromkeys(_needed(function), nothing), **given}
    returned = function(**given)
    if isinstance(returned, str | Mapping) or not isinstance(returned, Iterable):
        raise ConfigError(
            f"The reward {name!r} returned {shortened(returned)}, not a list. It is to return one "
            "number for each answer, or None where it does not judge one."
        )
    values = list(returned)
    if len(values) != len(rows):
        raise ConfigError(
            f"The reward {name!r} returned {len(values)} values for {len(rows)} answers. It is to "
            "return one for each, or None where it does not judge an answer."
        )
    numbers = [math.nan if value is None else _number(value) for value in values]
    for place, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if value is not None and not math.isfinite(number):
            raise ConfigError(
                f"The reward {name!r} returned {shortened(value)} for row {rows[place]['row']}, "
                f"whose answer is {shortened(text_of(completions[place]))}. Rewards are "
                "finite numbers, or None where an answer is not judged."
            )
    return numbers


def _check_expected(name: str, function: RewardFunction, row: Mapping[str, Any]) -> None:
    kinds: Any = str if function is word_overlap else object
    value = row["columns"].get("expected")
    if value is None or not isinstance(value, kinds):
        needed = "text" if kinds is str else 'JSON (for null, the text "null")'
    elif function is json_exactness and isinstance(value, str) and _is_broken_json(value):
        needed = "JSON, with double quotes, true, false and null, and nothing around it"
    else:
        return
    raise ConfigError(
        f"The reward {name!r} cannot compare with row {row['row']}, whose column expected "
        f"holds {shortened(value)}. It is to hold {needed}: add it to the row, or "
        "take the row out."
    )


def _is_broken_json(text: str) -> bool:
    """Whether a text was meant as JSON and is not, so that no answer could equal it."""
    if not text.lstrip().startswith(("{", "[", "```")):
        return False
    try:
        parse_json(text)
    except ValueError:
        return True
    return False


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.inf
