"""First rows of a data file, read without the training libraries."""

from __future__ import annotations

import itertools
import json
import tempfile
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
# Documents and lines are read whole, which must not fill the page's memory: of a larger file, the
# first lines are read. A JSON document has no rows then.
_DOCUMENT_BYTES, _HEAD_BYTES = 50_000_000, 4_000_000
_TABLES, _BINARY, _BOOKS = (".csv", ".tsv", ".tab"), (".parquet", ".arrow"), (".xlsx", ".xlsm")


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
        options = import_module("lightning_peft.data.file_format").ReadOptions
        with tempfile.TemporaryDirectory(prefix="studio-") as folder:
            start = _bounded(path, files, Path(folder))
            if start is None:
                return None
            reading = files.read_file(start, path.name, options(**given, columns=named))
            values = (entry.value for entry in reading.rows() if entry.value is not None)
            rows = list(itertools.islice(values, most))
    except (OSError, ValueError, ImportError, RecursionError, LightningPeftError):
        return None
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    return Table(names, [[_format(row.get(name)) for name in names] for row in rows])


def _bounded(path: Path, files: Any, folder: Path) -> Path | None:
    """Returns a file with the first rows that may be read whole: a part of it is in ``folder``."""
    opened: Any = import_module("lightning_peft.data.open_files")
    suffix, size = files.suffix_of(path), path.stat().st_size
    if suffix in _BINARY:
        return path
    if suffix in _BOOKS:
        return path if size <= _DOCUMENT_BYTES else None
    if size <= _DOCUMENT_BYTES and opened.compression_of(path) is None:
        return path
    with opened.open_file(path, path.name) as file:
        content = file.read(_DOCUMENT_BYTES + 1)
    if len(content) > _DOCUMENT_BYTES:
        content = content[: content.rfind(b"\n", 0, _HEAD_BYTES) + 1]
        # A line may end within a quoted value.
        while suffix in _TABLES and content.count(b'"') % 2:
            content = content[: content.rfind(b"\n", 0, -1) + 1]
    part = folder / f"part{suffix}"
    part.write_bytes(content)
    return part


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
