"""Copies of a JSONL file with rows changed or excluded; other row numbers are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from gradio_app.errors import UserError
from gradio_app.guards import shortened

LONGEST_ROW = 100_000
_SUFFIXES = (".jsonl", ".ndjson")


def row_text(path: Path, number: int) -> str:
    """Returns a row as indented JSON. Raises UserError if there is none that can be edited."""
    for place, line in _lines(path):
        if place == number:
            return _json(_row(line, number), number, indent=1)
    raise UserError("data.edit_none", row=number)


def write_edited(path: Path, number: int, text: str | None, target: Path) -> None:
    """Writes a copy of a file in which a row is another one; with ``None`` it is left out.

    Its line is empty then, which readers skip. Raises UserError if there is no such row, or the new
    one is not a JSON object.
    """
    new = b"" if text is None else _compact(text, number)
    found = False
    with target.open("wb") as file:
        for place, line in _lines(path):
            if place == number:
                _row(line, number)
                found, line = True, new + b"\n"
            file.write(line)
    if not found:
        raise UserError("data.edit_none", row=number)


def _compact(text: str, number: int) -> bytes:
    if len(text) > LONGEST_ROW:
        raise UserError("checks.long_text", most=LONGEST_ROW)
    row = _row(text.encode("utf-8", "surrogatepass"), number)
    return _json(row, number).encode()


def _json(row: dict[str, object], number: int, indent: int | None = None) -> str:
    text = json.dumps(row, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Half of a surrogate pair, such as "\ud83d".
        raise UserError("data.edit_json", row=number, reason=shortened(error)) from None
    return text


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if path.suffix.lower() not in _SUFFIXES or not path.is_file():
        raise UserError("data.edit_kind")
    with path.open("rb") as file:
        yield from enumerate(file, start=1)


def _row(line: bytes, number: int) -> dict[str, object]:
    if not line.strip():
        raise UserError("data.edit_none", row=number)
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError("data.edit_json", row=number, reason=shortened(error)) from None
    if not isinstance(found, dict):
        raise UserError("data.edit_json", row=number, reason=type(found).__name__)
    return found
