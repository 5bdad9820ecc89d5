"""The first rows of a data file as they stand in it, without the libraries that train on them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gradio_app.recipe.content import value_at
from lightning_peft.errors import LightningPeftError

MAX_ROWS = 20
_READ_OPTIONS = ("encoding", "delimiter", "sheet", "text_unit")
MAX_CHARACTERS = 200
# A JSON document is read whole; of a larger one, the rows are shown once they are checked.
_DOCUMENT_BYTES = 50_000_000


@dataclass(frozen=True)
class Table:
    """Some rows of a file: the names of all their columns, and their values as text."""

    columns: list[str]
    rows: list[list[str]]


def first_rows(
    path: Path, content: Mapping[str, Any] | None = None, most: int = MAX_ROWS
) -> Table | None:
    """Returns the first rows of a file or folder; ``None`` where nothing of it can be read.

    The recipe may set how files are read.
    """
    files: Any = import_module("lightning_peft.data.data_files")
    if path.is_dir():
        found = sorted(filter(files.is_data_file, path.rglob("*")))
        return first_rows(found[0], content, most) if found else None
    data = value_at(content or {}, "data.init_args", None)
    data = data if isinstance(data, Mapping) else {}
    given = {name: data[name] for name in _READ_OPTIONS if data.get(name) is not None}
    columns = data.get("columns")
    named = frozenset(columns.values() if isinstance(columns, Mapping) else ())
    try:
        if path.suffix.lower() == ".json" and path.stat().st_size > _DOCUMENT_BYTES:
            return None
        options = import_module("lightning_peft.data.file_format").ReadOptions
        reading = files.read_file(path, path.name, options(**given, columns=named))
        values = (entry.value for entry in reading.rows() if entry.value is not None)
        rows = list(itertools.islice(values, most))
    except (OSError, ValueError, ImportError, RecursionError, LightningPeftError):
        return None
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    return Table(names, [[_format(row.get(name)) for name in names] for row in rows])


def count_rows(path: Path) -> int | None:
    """Returns how many rows a file has about; ``None`` where only reading all of it would tell."""
    if path.suffix.lower() not in (".jsonl", ".ndjson") or not path.is_file():
        return None
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            count, last = count + part.count(b"\n"), part[-1:]
    return count + (last != b"\n")


def _format(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else _json(value)
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "\u2026"


def _json(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return _json(value["bytes"])
    return json.dumps(value, ensure_ascii=False, default=str)
