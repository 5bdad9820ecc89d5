"""Reading of Parquet and Arrow files, with class names, images and audio."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import ipc, parquet

from lightning_peft.data.file_format import ClassName, FileFormat, ReadableFile, Row
from lightning_peft.data.open_files import compression_of, explain_errors, explained_rows, open_file
from lightning_peft.errors import ConfigError

_BATCH = 256


def read_columnar(path: Path, name: str, kind: str) -> ReadableFile:
    """Opens a Parquet or Arrow file."""
    with _batches(path, name, kind) as (schema, _):
        twice = [column for column, count in Counter(schema.names).items() if count > 1]
        classes = _classes(schema)
    if twice:
        raise ConfigError(
            f"{name!r} has the columns {twice} twice. Each name stands for one column."
        )
    notes = []
    if "__index_level_0__" in schema.names:
        notes.append("the column '__index_level_0__' is an index of pandas: not read")

    def rows() -> Iterator[Row]:
        number = 0
        with _batches(path, name, kind) as (_, batches):
            for batch in batches:
                for value, problem in _rows_of(batch):
                    number += 1
                    value.pop("__index_level_0__", None)
                    named = {**value, **_named(value, classes)}
                    yield Row(number, name, None if problem else named, problem)

    return ReadableFile(FileFormat(kind, compression_of(path), notes=tuple(notes)), rows)


@contextmanager
def _batches(path: Path, name: str, kind: str) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Opens a file, and gives its schema and its rows in batches."""
    hint = "Write or download it once more, or convert it to JSONL."
    with ExitStack() as stack, explain_errors(name):
        try:
            file: Any = stack.enter_context(open_file(path, name))
            if compression_of(path) is not None:
                # These are read from their end.
                file = pyarrow.BufferReader(file.read())
            if kind == "Parquet":
                found: Any = stack.enter_context(parquet.ParquetFile(file))
                yield found.schema_arrow, _guarded(found.iter_batches(batch_size=_BATCH), name)
                return
            start = file.read(6)
            file.seek(0)
            found = ipc.open_file(file) if start == b"ARROW1" else ipc.open_stream(file)
            whole = range(found.num_record_batches) if start == b"ARROW1" else found
            batches = (found.get_batch(b) if start == b"ARROW1" else b for b in whole)
            yield found.schema, _guarded(batches, name)
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(
                f"{name!r} cannot be read as {kind.lower()}: it is damaged, breaks off, or is "
                f"another kind of file than its name suggests. {hint}"
            ) from error


def _guarded(batches: Iterator[Any], name: str) -> Iterator[Any]:
    count = 0

    def explain(number: int, error: Exception) -> str:
        return (
            f"{name!r} is damaged after row {count}: what follows cannot be read. Write or "
            "download it once more, or convert it to JSONL."
        )

    for batch in explained_rows(batches, explain, (pyarrow.ArrowException, OSError)):
        yield batch
        count += batch.num_rows


def _rows_of(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    try:
        for row in batch.to_pylist(maps_as_pydicts="strict"):
            yield {name: without_nulls(value) for name, value in row.items()}, None
    # What a cell cannot be: text that is not UTF-8, a time before the first one of Python.
    except (pyarrow.ArrowException, ValueError, KeyError, OverflowError, ImportError):
        yield from (_by_cell(batch.slice(place, 1)) for place in range(batch.num_rows))


def _by_cell(row: Any) -> tuple[dict[str, Any], str | None]:
    values: dict[str, Any] = {}
    problem = None
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = without_nulls(column.to_pylist(maps_as_pydicts="strict")[0])
        except (pyarrow.ArrowException, ValueError, KeyError, OverflowError, ImportError) as error:
            try:
                values[name] = column.cast(pyarrow.string()).to_pylist()[0]
            except (pyarrow.ArrowException, ValueError):
                what = "text that is not UTF-8" if isinstance(error, UnicodeError) else "a value"
                problem = f"has {what} in column {name!r} that cannot be read ({column.type})"
    return values, problem


def _classes(schema: Any) -> dict[str, Any]:
    """Returns the features of columns with classes, which the datasets library keeps as numbers."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    # On use: the web page reads the first rows of a file in a process that stays light.
    datasets = import_module("datasets")
    try:
        stored = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        features = datasets.Features.from_dict(stored)
    # Written by a newer version, or by hand: the numbers are labels as well.
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: feature for name, feature in features.items() if has_classes(feature)}


def _named(row: dict[str, Any], classes: dict[str, Any]) -> dict[str, Any]:
    """Returns the classes of a row by their names, and gaps of pandas as no value."""
    gaps = {n: None for n, v in row.items() if isinstance(v, float) and math.isnan(v)}
    return gaps | {n: with_class_names(row.get(n), kind) for n, kind in classes.items()}


def without_nulls(value: Any) -> Any:
    """Returns a value without the null keys of its objects.

    A column has one type, so that a tool with a town would have the parameters of every other tool.
    """
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list) and any(isinstance(one, (dict, list)) for one in value):
        return [without_nulls(one) for one in value]
    return value


def has_classes(feature: Any) -> bool:
    """Returns whether a feature of the datasets library is a class, or a list or object of them."""
    if isinstance(feature, dict):
        return any(map(has_classes, feature.values()))
    inner = getattr(feature, "feature", None)
    return hasattr(feature, "int2str") if inner is None else has_classes(inner)


def with_class_names(value: Any, feature: Any) -> Any:
    """Returns a value with the names of its classes, as in the tags of words.

    ``None`` for -1, a label that is withheld, as in test splits.
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        return {n: with_class_names(v, feature.get(n)) for n, v in value.items()}
    inner = getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [with_class_names(one, inner) for one in value]
    if not hasattr(feature, "int2str"):
        return value
    names = feature.names
    return ClassName.of(value, names) if value is not None and 0 <= value < len(names) else None
