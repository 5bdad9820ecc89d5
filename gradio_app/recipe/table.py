"""The first rows of a data file as they stand in it, without the libraries that train on them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gradio_app.recipe.content import value_at
from lightning_peft.errors import LightningPeftError

MAX_ROWS = 20
_READ_OPTIONS = ("encoding", "delimiter", "sheet")
MAX_CHARACTERS = 200
# Longer lines are not examples.
MAX_LINE = 1_000_000
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
    given = {
        name: value_at(content or {}, f"data.init_args.{name}", None) for name in _READ_OPTIONS
    }
    columns = value_at(content or {}, "data.init_args.columns", None)
    given["columns"] = frozenset(columns.values() if isinstance(columns, Mapping) else ())
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS)
        return first_rows(files[0], content, most) if files else None
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        return None
    try:
        rows = list(itertools.islice(reader(path, given), most))
    except (OSError, ValueError, ImportError, LightningPeftError):
        return None
    columns = list(dict.fromkeys(str(name) for row in rows for name in row))
    return Table(columns, [[_format(row.get(name)) for name in columns] for row in rows])


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


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        while line := file.readline(MAX_LINE):
            yield line


def _json_lines(path: Path, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for line in _lines(path):
        if line.strip():
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                yield found


def _document(path: Path, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if path.stat().st_size > _DOCUMENT_BYTES:
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except RecursionError:
        return
    if isinstance(found, dict):
        found = next((rows for rows in found.values() if isinstance(rows, list)), [])
    yield from (row for row in found if isinstance(row, dict))


def _with_library(path: Path, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields rows as the library reads them: encoding, delimiter and sheet given or detected."""
    options = import_module("lightning_peft.data.file_format").ReadOptions(**given)
    reading = import_module("lightning_peft.data.data_files").read_file(path, path.name, options)
    yield from (entry.value for entry in reading.rows() if entry.value is not None)


def _text(path: Path, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from ({"text": line.rstrip("\r\n")} for line in _lines(path) if line.strip())


def _parquet(path: Path, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
    parquet: Any = import_module("pyarrow.parquet")
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=MAX_ROWS):
            yield from batch.to_pylist()


_READERS = {
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    ".json": _document,
    **dict.fromkeys((".csv", ".tsv", ".xlsx"), _with_library),
    **dict.fromkeys((".txt", ".md"), _text),
    ".parquet": _parquet,
}
