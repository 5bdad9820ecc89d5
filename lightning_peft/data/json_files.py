"""Reading of JSON files: JSON Lines, arrays, columns, or concatenated values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, repeat
from json import JSONDecodeError
from typing import Any

from lightning_peft.data.file_format import ReadableFile, Row, TextFile
from lightning_peft.data.json_text import (
    explain_error,
    iter_json_values,
    json_type,
    lone_surrogate_in,
    may_have_lone_surrogates,
    parse_json,
)
from lightning_peft.data.open_files import open_file
from lightning_peft.data.row_keys import is_turn
from lightning_peft.errors import ConfigError

SPLIT_KEYS = ("train", "training", "validation", "valid", "val", "dev", "eval", "test", "testing")
_ROW_KEYS = ("data", "rows", "examples", "items", "instances", "records", "samples")
# Lines that are looked at to see whether each is a value of its own.
_SAMPLE_LINES = 20


def read_json(file: TextFile, by_line: bool) -> ReadableFile:
    """Opens a JSON file; ``by_line`` if each line is a row by its name."""
    lines = ReadableFile(file.format("JSON lines"), lambda: _line_rows(file))
    if _lines_are_rows(file, by_line):
        return lines
    try:
        count = len(_values(file)[1])
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        text = _text(file)
        if by_line or _lines_fit(text.splitlines()):
            # One damaged row hides no other.
            return lines
        line = f", in line {error.lineno}" if isinstance(error, JSONDecodeError) else ""
        raise ConfigError(
            f"{file.name!r} {explain_error(error, text)}{line}. Repair the file; `python "
            f"-m json.tool {file.name}` checks it, and in JSONL one bad row does not hide the "
            "others."
        ) from error
    kind = "JSON" if count == 1 else "JSON, one value after another"
    # It is not kept in memory from one reading to the next.
    return ReadableFile(file.format(kind), lambda: _document_rows(file, by_line))


def _values(file: TextFile) -> tuple[str, list[Any]]:
    text = _text(file)
    if not text.strip():
        raise ConfigError(f"There are no rows in {file.name!r}: the file is empty.")
    return text, list(iter_json_values(text))


def _document_rows(file: TextFile, by_line: bool) -> Iterator[Row]:
    text, values = _values(file)
    one = values[0] if len(values) == 1 else values
    if by_line and len(values) == 1 and isinstance(one, dict):
        one = values
    lone_surrogates = may_have_lone_surrogates(text) or not file.charset.whole
    for number, (value, split) in enumerate(_rows_in(one, file.name), start=1):
        problem = _value_problem(value, lone_surrogates)
        yield Row(number, file.name, None if problem else value, problem, split)


def _value_problem(value: Any, lone_surrogates: bool) -> str | None:
    cut = f"was cut by the viewer of the hub in {value}; download the data itself"
    if isinstance(value, _TruncatedCells):
        return cut
    return (lone_surrogate_in(value) if lone_surrogates else None) or _as_row(value)[1]


class _TruncatedCells(str):
    """Names of cells that the viewer of the hub has cut."""


def _text(file: TextFile) -> str:
    with file.open(newline="") as text:
        return text.read().removeprefix("\ufeff")


def _lines_are_rows(file: TextFile, by_line: bool) -> bool:
    """Whether each line is a row, by the first lines."""
    with file.open("replace") as text:
        # A document in one line is read whole, and not here.
        lines = list(islice((line for line in text if line.strip()), _SAMPLE_LINES))
    objects = [isinstance(parse_json(line)[0], dict) for line in lines]
    if by_line:
        opens = bool(lines) and lines[0].strip()[:1] in ("{", "[")
        return not opens or objects[0] or (2 * sum(objects) > len(lines) and len(lines[0]) > 3)
    return len(lines) > 1 and objects[0] and any(objects[1:])


def _lines_fit(lines: list[str]) -> bool:
    """Returns whether a document that is not JSON has a row in most of its lines."""
    some = [line for line in lines if line.strip(" \t,[]")][:100]
    good = sum(isinstance(_parse_line(line)[0], dict) for line in some)
    return len(some) > 1 and 2 * good >= len(some)


def _line_rows(file: TextFile) -> Iterator[Row]:
    if not file.charset.name.startswith("utf-8"):
        with file.open() as lines:
            for number, text in enumerate(lines, start=1):
                yield from _entry(file, number, text)
        return
    with open_file(file.path, file.name) as raw:
        for number, line in enumerate(raw, start=1):
            try:
                yield from _entry(file, number, line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Row(number, file.name, None, f"is not UTF-8 (byte {error.start + 1})")


def _entry(file: TextFile, number: int, text: str) -> Iterator[Row]:
    # Marks at the start of a file, or of each that was joined to it, and of RFC 7464.
    text = text.lstrip("\ufeff\x1e")
    # A list with a value in each line is read like lines.
    if text.strip() not in ("", "[", "]"):
        value, problem = _parse_line(text)
        if problem is None:
            value, problem = _as_row(value)
        yield Row(number, file.name, value, problem)


def _parse_line(text: str) -> tuple[Any, str | None]:
    value, problem = parse_json(text)
    body = text.strip()
    if problem is not None and body.endswith((",", "]")) or body.startswith("[{"):
        inner, inner_problem = parse_json(
            body.removeprefix("[").removesuffix("]").removesuffix(",")
        )
        if inner_problem is None:
            return inner, None
    return value, problem


def _as_row(value: Any) -> tuple[dict[str, Any] | None, str | None]:
    if isinstance(value, dict):
        return value, None
    turns = isinstance(value, list) and value and all(map(is_turn, value))
    remedy = ': a conversation is {"messages": [turns]}' if turns else ""
    return None, f"is {json_type(value)}, not an object with named fields{remedy}"


# What stands in one row, also where it is the only list of an object.
_IN_A_ROW = {"messages", "conversations", "conversation", "prompt", "completion", "chosen"}
_IN_A_ROW |= {"rejected", "tokens", "words", "tags", "ner_tags", "labels", "tools"}

_ValueAndSplit = tuple[Any, str | None]


def _rows_in(found: Any, name: str) -> Iterator[_ValueAndSplit]:
    """Yields the rows of a document with the split that it names."""
    if isinstance(found, list):
        yield from zip(found, repeat(None))
        return
    if not isinstance(found, dict):
        raise ConfigError(f"{name!r} holds {json_type(found)}, not a list of objects.")
    lists = {key: value for key, value in found.items() if isinstance(value, list)}
    if _is_hub_viewer_page(found):
        for row in found["rows"]:
            cut = row.get("truncated_cells")
            yield _TruncatedCells(", ".join(map(str, cut))) if cut else row["row"], None
    elif set(found) == {"columns", "index", "data"} and len(lists) == 3:
        # pandas, orient="split".
        yield from zip(
            (dict(zip(lists["columns"], r, strict=False)) for r in lists["data"]), repeat(None)
        )
    elif len(lists) > 1 and all(key.lower() in SPLIT_KEYS for key in lists):
        for key, rows in lists.items():
            yield from zip(rows, repeat(key.lower()))
    elif set(lists) & _IN_A_ROW and not _are_columns(found):
        yield found, None
    elif len(lists) == 1:
        yield from zip(next(iter(lists.values())), repeat(None))
    else:
        yield from zip(_rows_of_columns(found) or _choose_list(found, lists, name), repeat(None))


def _rows_of_columns(found: dict[str, Any]) -> list[Any]:
    """Returns the rows of a table that is written by columns, or by the numbers of its rows."""
    values = list(found.values())
    if _are_columns(found):
        return [dict(zip(found, row, strict=True)) for row in zip(*values, strict=True)]
    if not values or not all(isinstance(value, dict) and value for value in values):
        return []
    numbers = values[0].keys()
    if _are_numbers(numbers) and all(value.keys() == numbers for value in values):
        # pandas by default: a column each, with the values by the number of their row.
        return [{key: found[key][number] for key in found} for number in numbers]
    return values if _are_numbers(found) else []


def _choose_list(found: dict[str, Any], lists: dict[str, list[Any]], name: str) -> list[Any]:
    named = [key for key in _ROW_KEYS if key in lists]
    objects = [k for k, rows in lists.items() if rows and all(isinstance(r, dict) for r in rows)]
    for keys in (named, objects):
        if len(keys) == 1:
            return lists[keys[0]]
    what = f" ({', '.join(lists)})" if lists else ""
    raise ConfigError(
        f"{name!r} holds one JSON object with {len(lists)} lists{what}. Rows are expected as a "
        "list of objects, as the only list of one object, or as a list for each split (train, "
        f"validation, test). `jq -c '.KEY[]' {name} > rows.jsonl` takes one of them out."
    )


def _is_hub_viewer_page(found: dict[str, Any]) -> bool:
    """Returns whether this is an answer of the hub's viewer of datasets."""
    rows = found.get("rows")
    return (
        "features" in found
        and isinstance(rows, list)
        and all(isinstance(row, dict) and isinstance(row.get("row"), dict) for row in rows)
    )


def _are_columns(found: dict[str, Any]) -> bool:
    lists = list(found.values())
    if len(lists) < 2 or not all(isinstance(values, list) for values in lists):
        return False
    plain = all(isinstance(value, str | int | float | None) for v in lists for value in v)
    return plain and len({len(values) for values in lists}) == 1


def _are_numbers(keys: Iterable[str]) -> bool:
    return all(key.isdigit() for key in keys)
