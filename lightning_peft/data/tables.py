"""Reading of delimited text files (CSV, TSV), with detection of the dialect."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_peft.data.file_format import ReadableFile, Row, TextFile
from lightning_peft.data.table_columns import Columns, TableScan, resolve_columns
from lightning_peft.errors import ConfigError

_HEAD = 1 << 18


_USUAL = (",", ";", "\t", "|")
_RARE = ("\x01", "\x1f", "^", "~", "\u00a6")
_NAMED = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|", "space": " "}


def read_table(
    file: TextFile, suffix: str, delimiter: str | None, known: frozenset[str]
) -> ReadableFile:
    """Opens a table of text, every value a text; ``known`` are names of columns to expect."""
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
            f"{name!r} begins like JSON, and its name suggests that it is a table. Name it .jsonl "
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
            if self._has_escaped_quotes():
                escaped = replace(dialect, escaped=True)
                with suppress(_QuoteError):
                    return escaped, self._widths(escaped)
            raise ConfigError(str(error)) from error

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
            lines: list[str] = []

            def recorded() -> Iterator[str]:
                for line in text:
                    # The start of an endless value is enough.
                    if len(lines) < 10_000:
                        lines.append(line)
                    yield line

            reader = dialect.records(recorded())
            while True:
                first = dialect.skipped + reader.line_num + 1
                lines.clear()
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise _QuoteError(self.name, first, lines, dialect) from error
                if record:
                    ending = lines[-1] if lines else ""
                    yield first, ending[len(ending.rstrip("\r\n")) :][-2:], record

    def rows(self, dialect: Dialect, columns: Columns) -> Iterator[Row]:
        """Yields the rows."""
        number, records = 0, self._records(dialect)
        # The names of the columns.
        next(records, None)
        for line, _, record in records:
            if any(record):
                number += 1
                value, problem = columns.row(record, line)
                yield Row(number, self.name, value, problem)


class _QuoteError(ConfigError):
    """Quotes that do not fit, with the line in which they begin."""

    def __init__(self, name: str, first: int, lines: list[str], dialect: Dialect) -> None:
        line, field, what = _quote_fault("".join(lines), dialect)
        at = first + line
        super().__init__(
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


@dataclass(frozen=True)
class Dialect:
    """How a table is written.

    A quote in a quoted value has a backslash before it if ``escaped``, else it is doubled; a space
    follows each delimiter if ``spaced``; ``skipped`` lines precede the names of the columns.
    """

    delimiter: str
    quote: str = '"'
    escaped: bool = False
    spaced: bool = False
    skipped: int = 0

    def records(self, lines: Iterable[str]) -> Any:
        """Returns a reader of records in lines of text with their ends."""
        # Python's limit of 128 KiB is the length of a long document.
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        if self.escaped:
            lines = (line.replace('\\"', '""') for line in lines)
        return csv.reader(
            iter(lines),
            delimiter=self.delimiter,
            quotechar=self.quote,
            skipinitialspace=self.spaced,
            strict=True,
        )


def parse_delimiter(requested: str) -> str:
    """Returns the delimiter that the user means, such as ``";"`` or ``"tab"``."""
    found = _NAMED.get(requested.lower(), requested)
    if len(found) != 1 or found in '"\r\n\\':
        raise ConfigError(
            f"delimiter={requested!r} is not one character that parts columns. Such are "
            f"{', '.join(map(repr, _USUAL))}, and the words {', '.join(sorted(_NAMED)[1:])}."
        )
    return found


def detect_dialect(
    head: str, whole: bool, usual: str, requested: str | None, known: frozenset[str]
) -> Dialect:
    """Returns how a table is written by its ``head``; ``known`` names make a delimiter likely."""
    skipped = 0
    excel_hint = re.match(r'"?sep=(.)"?\r?\n', head)
    if excel_hint:
        # A line that Excel writes for itself.
        skipped, head = 1, head[excel_hint.end() :]
        requested = requested or excel_hint[1]
    candidates = (requested,) if requested is not None else _USUAL
    found = _best(head, whole, candidates, usual, known)
    if found is None and requested is None:
        # R's write.table parts quoted names by spaces.
        quoted = re.match(r'"[^"\r\n]*"( "[^"\r\n]*")+\r?\n', head)
        found = _best(head, whole, (*_RARE, " ") if quoted else _RARE, usual, known)
    return replace(found or Dialect(requested or usual), skipped=skipped)


def _best(
    head: str, whole: bool, candidates: Iterable[str], usual: str, known: frozenset[str]
) -> Dialect | None:
    ranked = []
    for delimiter in candidates:
        for dialect in _candidates(head, delimiter):
            records = _sample_records(dialect, head, whole)
            if not records or len(records[0]) < 2:
                continue
            width = len(records[0])
            # Rows of another width show that the delimiter is part of the text.
            fit = sum(len(record) == width for record in records) / len(records)
            names = sum(bool({n.strip(), n.strip().lower()} & known) for n in records[0])
            ranked.append(((round(fit, 3), names, delimiter == usual), dialect))
    return max(ranked, key=lambda one: one[0])[1] if ranked else None


def _candidates(head: str, delimiter: str) -> Iterator[Dialect]:
    plain = Dialect(delimiter)
    first = head.partition("\n")[0].strip()
    names = first.split(delimiter)
    if len(names) > 1 and all(re.fullmatch(r"\s*'.*'\s*", name) for name in names):
        yield replace(plain, quote="'")
        return
    # `"a", "b"`: else the second quote would be part of the text.
    spaced = len(names) > 1 and all(re.match(r'\s+"', name) for name in names[1:])
    yield replace(plain, spaced=spaced)


def _sample_records(dialect: Dialect, head: str, whole: bool) -> list[list[str]]:
    found: list[list[str]] = []
    try:
        for record in dialect.records(io.StringIO(head, newline="")):
            found += [record] if record else []
    except csv.Error:
        # Cut off, or quoted in another way, which is seen when all of it is read.
        return found
    return found if whole else found[:-1] or found
