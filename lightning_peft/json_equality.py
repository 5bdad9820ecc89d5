"""JSON parsing and equality, for rewards, scores and comparisons."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: If it is not JSON, which has no NaN and no infinity; or is nested too deeply
            for Python's parser.
    """

    def refused(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refused)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_object(line: str) -> dict[str, Any] | None:
    """Returns the JSON object on a line; ``None`` where there is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        # The second of a line that nests a thousand times: no request, and no reason to end.
        return None
    return row if isinstance(row, dict) else None


def equal_values(one: Any, other: Any) -> bool:
    """Returns whether values are equal as JSON, where ``true`` is not 1."""
    pairs = [(one, other)]
    while pairs:
        a, b = pairs.pop()
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            pairs += [(a[key], b[key]) for key in a]
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            pairs += zip(a, b, strict=True)
        elif isinstance(a, dict | list) or isinstance(a, bool) != isinstance(b, bool) or a != b:
            return False
    return True


def equal_texts(answer: str, expected: str) -> bool:
    """Whether two texts are JSON and their values equal, in any order of keys."""
    try:
        return equal_values(parse_json(answer), parse_json(expected))
    except ValueError:
        return False
