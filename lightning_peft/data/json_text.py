"""JSON parsing with readable errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class _Repeated(ValueError):
    """A key that an object names twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(next(key for key in keys if keys.count(key) > 1))
    return found


def _constant(name: str) -> float | None:
    # Tables that are written as JSON hold NaN where there is no value.
    return None if name == "NaN" else float(name.replace("Infinity", "inf"))


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def parse_json(text: str) -> tuple[Any, str | None]:
    """Returns the value of a JSON text and what is wrong with it, one of them ``None``."""
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return None, explain_error(error, text)
    problem = lone_surrogate_in(value) if may_have_lone_surrogates(text) else None
    return (None, problem) if problem is not None else (value, None)


def json_type(value: Any) -> str:
    """Returns the JSON type of a value, such as ``"a number"`` or ``"a list"``."""
    names = (
        (str, "a text"),
        # Before numbers, of which Python counts it one.
        (bool, "true or false"),
        (int | float | Decimal, "a number"),
        (list | tuple, "a list"),
        (dict, "an object"),
        (bytes, "bytes"),
        (date | time | timedelta, "a date or time"),
    )
    if value is None:
        return "null"
    return next((name for kind, name in names if isinstance(value, kind)), "a value")


def texts_in(value: Any) -> Iterator[str]:
    """Yields every text in a value, but the names of keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(inner)


def may_have_lone_surrogates(text: str) -> bool:
    """Returns whether a JSON text may hold halves of characters; these are escaped in it."""
    return _ESCAPED_HALF.search(text) is not None


def iter_json_values(text: str) -> Iterator[Any]:
    """Yields the values of concatenated JSON; a ``ValueError`` where something else stands."""
    place, end = _skip(text, 0), len(text)
    while place < end:
        value, place = _DECODER.raw_decode(text, place)
        yield value
        place = _skip(text, place)


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def lone_surrogate_in(value: Any, where: str = "") -> str | None:
    """Returns where a value holds half of a surrogate pair, which is not a character."""
    if isinstance(value, str):
        found = _HALF.search(value)
        if found is None:
            return None
        code, at = f"\\u{ord(found[0]):04x}", found.start() + 1
        return (
            f"has half of a surrogate pair ({code}) as character {at} of {where or 'its text'}: "
            "the text was cut inside a character such as an emoji; write the whole character"
        )
    if isinstance(value, dict):
        items = [(f"{where}.{key}" if where else str(key), one) for key, one in value.items()]
        items += [(f"a key of {where or 'the row'}", key) for key in value]
    elif isinstance(value, list):
        items = [(f"{where}[{place}]", one) for place, one in enumerate(value)]
    else:
        return None
    return next(
        (half for name, one in items if (half := lone_surrogate_in(one, name)) is not None), None
    )


def explain_error(error: Exception, text: str) -> str:
    """Returns why a text is not JSON, as the end of a sentence that begins with the row."""
    if isinstance(error, RecursionError):
        return "is JSON that is nested too deeply to be read"
    if isinstance(error, _Repeated):
        return f"names {str(error)!r} twice in one object, of which one would be lost"
    if not isinstance(error, json.JSONDecodeError):
        return "is JSON with a number of too many digits"
    place, body = error.pos, text.rstrip()
    before, after = body[:place].rstrip(), body[place : place + 20]
    quoted = "single quotes, and JSON has double ones"
    is_open = error.msg.startswith("Unterminated")
    # Nothing follows an unclosed text where a file is cut.
    if not body[place:].strip() or (is_open and not body.endswith(("}", "]"))):
        return f"is cut off after {before[-30:]!r}"
    if is_open:
        what = "a text begins there whose closing quote is missing"
    elif error.msg.startswith("Extra data"):
        what = "something follows after the end of the value"
    elif error.msg.startswith("Invalid control"):
        what = "a raw line end, tab or other control character inside a text; write \\n or \\t"
    elif "escape" in error.msg:
        what = "a backslash that escapes nothing; write two of them"
    elif after.startswith("'"):
        what = f"{quoted}; a printed Python value is written as JSON by json.dumps"
    elif after.startswith(("//", "/*", "#")):
        what = "a comment, which JSON does not have"
    elif before.endswith(",") and after[:1] in "}]":
        what = "a comma before it that nothing follows"
    elif re.match(r"(True|False|None|undefined)\b", after):
        what = "a word that is not of JSON; it has true, false and null"
    elif error.msg.startswith("Expecting ','"):
        what = 'a comma is missing before it, or a quote inside the text is not written as \\"'
    else:
        what = "a value, or a name in double quotes, is expected there"
    return f"is not JSON at character {place + 1:,} ({after!r}): {what}"
