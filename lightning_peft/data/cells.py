"""Parsing of table cells that contain lists or objects, as JSON or Python literals."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Mapping
from typing import Any

from lightning_peft.data.json_text import lone_surrogate_in, parse_json
from lightning_peft.data.samples import RowProblems

# Fields that are never text.
_STRUCTURED = {
    *("messages", "tokens", "tags", "translation", "tools", "chat_template_kwargs"),
    *("documents", "history", "negatives"),
}
# Fields that may be turns in place of text.
_TURNS = {"prompt", "completion", "chosen", "rejected"}
# Keys that every turn has, in one of its forms.
ROLES = ({"role", "content"}, {"from", "value"}, {"role", "tool_calls"})


def parse_cells(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``fields`` with lists and objects that are in them as JSON or Python's ``repr``.

    A prompt or an answer is text unless it is a list of turns.
    """
    found, problems = dict(fields), []
    for name, value in fields.items():
        if name not in _STRUCTURED | _TURNS or not isinstance(value, str):
            continue
        text = value.strip()
        if not text.startswith(("[", "{")):
            continue
        inner, problem = literal_value(text)
        if name in _STRUCTURED:
            found[name] = inner
            problems += [("missing", f"has text as {name} that {problem}")] if problem else []
        elif problem is None and _are_turns(inner):
            found[name] = inner
    if problems:
        raise RowProblems(problems)
    return found


def _are_turns(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(t, dict) and any(names <= t.keys() for names in ROLES) for t in value)
    )


def literal_value(text: str) -> tuple[Any, str | None]:
    """Returns the value of JSON or of a Python literal, and why there is none."""
    value, problem = parse_json(text)
    if problem is None or "'" not in text:
        return value, problem
    if _is_printed_array(text):
        return None, (
            "is a printed array of NumPy, which leaves out the commas: write the rows with "
            "df.to_json('rows.jsonl', orient='records', lines=True)"
        )
    try:
        value = ast.literal_eval(text)
    # MemoryError and RecursionError: nested too deeply for Python's own parser.
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None, problem
    half = lone_surrogate_in(value)
    return (None, half) if half is not None else (value, None)


def _is_printed_array(text: str) -> bool:
    """Returns whether values follow each other without a comma, or some are left out."""
    last = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.NL, tokenize.NEWLINE):
                continue
            closes, opens = last in ("}", "]") or last[:1] in ("'", '"'), token.string[:1]
            if token.string == "..." or (closes and opens in ("{", "[", "'", '"')):
                return True
            last = token.string[-1:] if token.type == tokenize.STRING else token.string
    except (tokenize.TokenError, SyntaxError):
        return False
    return False
