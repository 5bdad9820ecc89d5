"""Rows of text tables (CSV, TSV and their like), of which all is looked at before the first row."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_peft.data.file_format import FileRow, ReadableFile, TextFile
from lightning_peft.data.table_columns import Columns, TableScan, resolve_columns
from lightning_peft.data.table_dialect import Dialect, detect_dialect, parse_delimiter
from lightning_peft.errors import ConfigError

_HEAD = 1 << 18


def read_table(
    file: TextFile, suffix: str, delimiter: str | None, known: frozenset[str]
) -> ReadableFile:
    """Opens a table of text, every value a text; ``known`` are names of columns to expect.

    Raises:
        ConfigError: If it is not a table with a line of column names.
    """
    name = file.name
    if not file.charset.whole:
        raise ConfigError(
            f"{name!r} is UTF-8 with damaged bytes, first in line {_damaged_line(file)}. "
            f"Repair that line, or drop the bytes: iconv -c -f UTF-8 -t UTF-8 {name} > repaired.csv"
        )
    with file.open(newline="") as text:
        head = text.read(_HEAD)
    whole = len(head) < _HEAD
    if not head.strip():
        raise ConfigError(f"There are no rows in {name!r}: the file is empty.")
    if head.lstrip().startswith(("{", "[{")):
        raise ConfigError(
            f"{name!r} begins like JSON, and its name says that it is a table. Name it .jsonl "
            f"where each line is an object, else .json: mv {name} {Path(name).stem}.jsonl"
        )
    table = _Table(file)
    requested = None if delimiter is None else parse_delimiter(delimiter)
    usual = "\t" if suffix == ".tsv" else ","
    dialect = detect_dialect(head, whole, usual, requested, known)
    dialect, widths = table.scan(dialect)
    columns = resolve_columns(widths, name)
    notes = list(columns.notes)
    if dialect.escaped:
        notes.append("quotes in a value have a backslash before them")
    if dialect.quote != '"':
        notes.append("values are in single quotes")
    format = file.format(
        "TSV" if suffix == ".tsv" else "CSV",
        delimiter=dialect.delimiter if len(widths.header) > 1 else None,
        notes=tuple(notes),
    )
    return ReadableFile(format, lambda: table.rows(dialect, columns))


def _damaged_line(file: TextFile) -> int:
    with file.open(newline="\n") as text:
        # Bytes that cannot be decoded became surrogates.
        lines = enumerate(text, start=1)
        return next((n for n, line in lines if re.search("[\udc80-\udcff]", line)), 0)


@dataclass(frozen=True)
class _Table:
    file: TextFile

    @property
    def name(self) -> str:
        return self.file.name

    def scan(self, dialect: Dialect) -> tuple[Dialect, TableScan]:
        """Reads all of it, and returns how it is quoted and the scan of its rows."""
        try:
            return dialect, self._widths(dialect)
        except _QuoteError as error:
            if not self._has_escaped_quotes():
                raise error.config_error from error
            escaped = replace(dialect, escaped=True)
            try:
                return escaped, self._widths(escaped)
            except _QuoteError:
                raise error.config_error from error

    def _has_escaped_quotes(self) -> bool:
        """Returns whether quotes have a backslash before them; refuses other backslashes then."""
        found, other = False, None
        with self.file.open(newline="") as text:
            for number, line in enumerate(text, start=1):
                found |= '\\"' in line
                if other is None and "\\" in line.replace('\\"', ""):
                    other = number
        if found and other is not None:
            raise ConfigError(
                f"{self.name!r} has quotes that are escaped by a backslash, and other backslashes "
                f"too, first in line {other}: whether these are text or escapes cannot be known. "
                "Write it with doubled quotes, as Python's csv, pandas and Excel do, or as JSONL."
            )
        return found

    def _widths(self, dialect: Dialect) -> TableScan:
        widths = TableScan()
        ends: dict[str, int] = {}
        for line, end, record in self._records(dialect):
            widths.add(record, line)
            ends.setdefault(end, line)
        alone = ends.pop("\r", None)
        if alone is not None and any(ends):
            raise ConfigError(
                f"{self.name!r} has a carriage return alone in line {alone}, and line "
                "feeds at the ends of others: whether it ends a line or is part of a text cannot "
                "be known. "
                f"Put such a text in quotes, or replace it: tr '\\r' ' ' < {self.name} > rows.csv"
            )
        if not widths.header:
            raise ConfigError(f"{self.name!r} is empty.")
        return widths

    def _records(self, dialect: Dialect) -> Iterator[tuple[int, str, list[str]]]:
        """Yields first line, line end and fields of every record that is not empty."""
        with self.file.open(newline="") as text:
            for _ in range(dialect.skipped):
                text.readline()
            last = _LineRecorder(text)
            reader = dialect.records(last)
            while True:
                first = dialect.skipped + reader.line_num + 1
                last.lines.clear()
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise _QuoteError(self.name, first, last.lines, dialect) from error
                if record:
                    ending = last.lines[-1] if last.lines else ""
                    yield first, ending[len(ending.rstrip("\r\n")) :][-2:], record

    def rows(self, dialect: Dialect, columns: Columns) -> Iterator[FileRow]:
        """Yields the rows."""
        number, records = 0, self._records(dialect)
        # The names of the columns.
        next(records, None)
        for line, _, record in records:
            if any(record):
                number += 1
                value, problem = columns.row(record, line)
                yield FileRow(number, value, problem)


class _LineRecorder:
    """Hands lines on, and keeps those of the record that is being read."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.lines: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for line in self._text:
            # The start of an endless value is enough.
            if len(self.lines) < 10_000:
                self.lines.append(line)
            yield line


class _QuoteError(Exception):
    """Quotes that do not fit, with the line in which they begin."""

    def __init__(self, name: str, first: int, lines: list[str], dialect: Dialect) -> None:
        super().__init__(name)
        line, field, what = _quote_fault("".join(lines), dialect)
        at = first + line
        self.config_error = ConfigError(
            f"{name!r} has {what} in line {at}, field {field}. Double a quote that is part of the "
            f'text ("" for "), and put such a value in quotes. To see the line: sed -n {at}p {name}'
        )


def _quote_fault(record: str, dialect: Dialect) -> tuple[int, int, str]:
    """Returns line in the record from 0, field from 1, and what is wrong with the quotes."""
    field, line, opened_at, quoted, start = 1, 0, 0, False, True
    place = 0
    while place < len(record):
        char, after = record[place], record[place + 1 : place + 2]
        if quoted and char == dialect.quote:
            if after == dialect.quote:
                place += 1
            elif after in ("", dialect.delimiter, "\r", "\n"):
                quoted = False
            else:
                return line, field, "text after the quote that ends a value"
        elif not quoted and start and char == dialect.quote:
            quoted, opened_at, start = True, line, False
        elif not quoted and char == dialect.delimiter:
            field, start = field + 1, True
        else:
            start = start and dialect.spaced and char == " "
        line += char == "\n"
        place += 1
    if quoted:
        return opened_at, field, "a quote that is never closed"
    return line, field, "a character that cannot be read"
