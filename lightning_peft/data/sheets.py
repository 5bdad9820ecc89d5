"""Reading of Excel sheets, including hidden and merged cells."""

from __future__ import annotations

import datetime
import io
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_peft.compat.openpyxl import open_xml
from lightning_peft.data.file_format import FileFormat, ReadableFile, Row
from lightning_peft.data.open_files import explain_errors, explained_rows
from lightning_peft.data.table_columns import Columns, TableScan, resolve_columns
from lightning_peft.errors import ConfigError, similar_names

_TRUE = ("1", "true")
_SHOWN = 10


def read_sheet(
    path: Path, name: str, sheet: str | int | None, known: frozenset[str]
) -> ReadableFile:
    """Opens a sheet by name or number from 1, or the only one with rows; all as text, as in CSV.

    ``known`` are names of columns that are recognised or mapped to fields.
    """
    if find_spec("openpyxl") is None:
        raise ConfigError(
            f"{name!r} is a workbook of Excel, which takes openpyxl to read: pip install "
            "'lightning-peft[excel]'. Or save its sheet as CSV (UTF-8)."
        )
    with _book(path, name) as (values, formulas):
        found = {title: _scan(values[title], known) for title in values.sheetnames}
        hidden = {t for t in found if values[t].sheet_state != "visible"}
        title = _choose_sheet(found, hidden, name, sheet, known)
        scan = found[title]
        _refuse_names_below(scan, name, title, known)
        columns = resolve_columns(scan, name, None)
        layout = _read_layout(values[title], name, scan.lines)
        if scan.header:
            _refuse_formulas(scan, values[title], formulas[title], name)
    notes = ["the sheet is hidden"] if title in hidden else []
    notes += [*columns.notes, *layout.notes(scan.lines, columns.names)]
    notes += [
        f"column {column!r}: {', '.join(f'{n:,} {kind}' for kind, n in counts.items())} as text"
        for place, column in columns.names.items()
        if (counts := scan.kinds.get(place))
    ]
    others = [
        f"{t} (hidden)" if t in hidden else t for t in found if t != title and found[t].header
    ]
    if others:
        notes.append(f"other sheets are not read: {', '.join(others)}")
    format = FileFormat("Excel", sheet=title, notes=tuple(notes))
    return ReadableFile(format, lambda: _rows(path, name, title, columns, layout))


@contextmanager
def _book(path: Path, name: str) -> Iterator[list[Any]]:
    """Opens a workbook, with the values of its formulas and with the formulas themselves."""
    openpyxl = import_module("openpyxl")
    with explain_errors(name):
        content = path.read_bytes()
    books: list[Any] = []
    try:
        for values in (True, False):
            file = io.BytesIO(content)
            books.append(openpyxl.load_workbook(file, read_only=True, data_only=values))
    # openpyxl raises whatever its XML reader does.
    except Exception as error:
        raise ConfigError(_damaged(name)) from error
    try:
        yield books
    finally:
        for book in books:
            book.close()


def _damaged(name: str) -> str:
    return (
        f"{name!r} cannot be read as a workbook of Excel: it is damaged, locked by a password, or "
        "another kind of file. Open it, and save it as .xlsx or its sheet as CSV (UTF-8)."
    )


def _cells(sheet: Any, name: str) -> Iterator[tuple[Any, ...]]:
    rows = sheet.iter_rows() if hasattr(sheet, "iter_rows") else ()
    return explained_rows(rows, lambda number, error: _damaged(name))


@dataclass
class _SheetScan(TableScan):
    """What one pass over a sheet has seen.

    ``top`` is the line with the names of the columns, ``named`` the first with several known ones;
    ``lines`` are those below with a value, ``kinds`` counts by column what becomes text.
    """

    top: int = 0
    named: int | None = None
    lines: list[int] = field(default_factory=list)
    kinds: dict[int, Counter[str]] = field(default_factory=dict)


def _scan(sheet: Any, known: frozenset[str]) -> _SheetScan:
    scan = _SheetScan()
    for line, row in enumerate(_cells(sheet, sheet.title), start=1):
        record = _texts(row)
        if not record and not scan.header:
            continue
        if scan.header:
            scan.lines += [line] if record else []
            for place, cell in enumerate(row):
                if kind := _kind(cell):
                    scan.kinds.setdefault(place, Counter())[kind] += 1
        scan.top = scan.top or line
        scan.add(record, line)
        # The names themselves, and a few rows below a title.
        if scan.named is None and scan.rows <= 5 and len(known & set(record)) > 1:
            scan.named = line
    return scan


def _texts(row: tuple[Any, ...]) -> list[str | None]:
    found = [_text(cell.value) for cell in row]
    while found and found[-1] is None:
        found.pop()
    return found


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not value):
        return None
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    if isinstance(value, datetime.timedelta):
        # As a cell of hours shows it: 30:00:00, and not "1 day, 6:00:00".
        # To the millisecond, as Excel counts: a day's share as a float has more digits.
        whole = round(value.total_seconds() * 1000)
        seconds, rest = divmod(abs(whole), 1000)
        fraction = f".{rest:03}".rstrip("0") if rest else ""
        sign = "-" if whole < 0 else ""
        return f"{sign}{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}{fraction}"
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    # Excel writes characters that XML does not have as `_x000D_`.
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda found: chr(int(found[1], 16)), str(value))


def _kind(cell: Any) -> str:
    value = cell.value
    if isinstance(value, bool):
        return "truth values"
    if isinstance(value, int | float):
        # 50%, 01234 or 3.00 EUR in Excel is 0.5, 1234 or 3 here.
        form = cell.number_format
        usual = form == "General" or (form == "0" and value == round(value))
        return "numbers" if usual else f"numbers that Excel shows as {form!r}"
    dates = datetime.date | datetime.time | datetime.timedelta
    return "dates or times" if isinstance(value, dates) else ""


def _choose_sheet(
    found: Mapping[str, TableScan],
    hidden: set[str],
    name: str,
    sheet: str | int | None,
    known: frozenset[str],
) -> str:
    titles = list(found)
    if sheet is not None:
        number = int(sheet) if str(sheet).isdecimal() and str(sheet) not in titles else None
        if number is not None and 1 <= number <= len(titles):
            return titles[number - 1]
        if str(sheet) in titles:
            return str(sheet)
        hint = similar_names(str(sheet), titles)
        raise ConfigError(f"{name!r} has no sheet {sheet!r}{hint}. Sheets: {', '.join(titles)}.")
    full = [t for t in titles if found[t].rows and t not in hidden]
    full = full or [t for t in titles if found[t].rows]
    for ones in (full, [t for t in full if known & set(found[t].header)]):
        if len(ones) == 1:
            return ones[0]
    if not full:
        raise ConfigError(f"{name!r} has no rows below a row of column names in any sheet.")
    raise ConfigError(
        f"{name!r} has rows in {len(full)} sheets: {', '.join(full)}. Say which one is meant with "
        f"sheet={full[0]!r}."
    )


def _refuse_formulas(scan: _SheetScan, values: Any, formulas: Any, name: str) -> None:
    """Refuses names of columns that a program would have to compute, and wrong ones."""
    header, own = (
        next(islice(_cells(s, name), scan.top - 1, None), ()) for s in (values, formulas)
    )
    for value, formula in zip(header, own, strict=False):
        if formula.data_type == "f" and value.value is None:
            what = "a formula whose value is not in the file"
        elif value.data_type == "e":
            what = f"the error {value.value}"
        else:
            continue
        raise ConfigError(
            f"{name!r} has {what} as the name of a column (cell {formula.coordinate}). Write the "
            "name itself there."
        )


def _refuse_names_below(scan: _SheetScan, name: str, title: str, known: frozenset[str]) -> None:
    """Refuses a title above the names of the columns that has as many cells as they."""
    if scan.named is not None and not known & set(scan.header):
        raise ConfigError(
            f"{name!r} has names of columns in row {scan.named} of the sheet {title!r}, below "
            f"{scan.header}. They belong into the first row: delete the rows above them in Excel."
        )


def _rows(path: Path, name: str, title: str, columns: Columns, layout: _Layout) -> Iterator[Row]:
    with _book(path, name) as (values, formulas):
        pairs = zip(_cells(values[title], name), _cells(formulas[title], name), strict=False)
        started, number = False, 0
        for line, (row, own) in enumerate(pairs, start=1):
            record = _texts(row)
            if not started:
                started = bool(record)
                continue
            problem = _cell_problem(row, own, columns)
            if problem is None and not record:
                continue
            number += 1
            value = None
            problem = (
                problem or layout.merged_in(line, columns.names) or _outside_problem(row, columns)
            )
            if problem is None:
                value, problem = columns.row(record, line)
            yield Row(number, name, value, problem)


def _outside_problem(row: tuple[Any, ...], columns: Columns) -> str | None:
    """Returns where a row has a value to the right of the names of the columns."""
    cell = next((cell for cell in row[columns.width :] if cell.value is not None), None)
    if cell is None:
        return None
    return (
        f"has a value in cell {cell.coordinate}, to the right of the {len(columns.names)} column "
        "names; delete it, or give its column a name"
    )


def _cell_problem(row: tuple[Any, ...], formulas: tuple[Any, ...], columns: Columns) -> str | None:
    for place, column in columns.names.items():
        if place >= len(row):
            continue
        value = row[place].value
        if row[place].data_type == "e":
            return f"has the error {value} in column {column!r} (cell {row[place].coordinate})"
        formula = place < len(formulas) and formulas[place].data_type == "f"
        if value is None and formula:
            return (
                f"has a formula in column {column!r} (cell {formulas[place].coordinate}) whose "
                "value is not in the file; open and save the workbook in Excel or LibreOffice"
            )
    return None


@dataclass
class _Layout:
    """Hidden rows and columns, and merged ranges of a sheet, counted from 1.

    A merged range is its first row and column, last row and column, and name; ``lines`` are the
    rows with a value, which it may have far fewer of.
    """

    lines: Sequence[int]
    rows: set[int] = field(default_factory=set)
    columns: list[tuple[int, int]] = field(default_factory=list)
    merged: list[tuple[int, int, int, int, str]] = field(default_factory=list)
    filtered: bool = False

    def notes(self, lines: Sequence[int], names: dict[int, str]) -> list[str]:
        """Describes what of the ``lines`` and columns (place to name) is hidden, and still read."""
        rows = [line for line in lines if line in self.rows]
        columns = [n for p, n in names.items() if any(a <= p + 1 <= b for a, b in self.columns)]
        found = []
        if rows:
            shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
            by = " (by hand or by a filter)" if self.filtered else ""
            are, word = ("row is", "row") if len(rows) == 1 else ("rows are", "rows")
            found.append(f"{len(rows):,} hidden {are} read{by}: {word} {shown} of the sheet")
        if columns:
            found.append(f"hidden columns are read: {', '.join(map(repr, columns))}")
        return found

    @cached_property
    def _merged_by_row(self) -> dict[int, list[tuple[int, int, int, str]]]:
        found: dict[int, list[tuple[int, int, int, str]]] = {}
        for top, left, bottom, right, ref in self.merged:
            within = slice(bisect_left(self.lines, top), bisect_right(self.lines, bottom))
            for line in self.lines[within]:
                found.setdefault(line, []).append((top, left, right, ref))
        return found

    def merged_in(self, line: int, names: dict[int, str]) -> str | None:
        """Returns why a row has no value of its own in a column, where cells are merged."""
        for top, left, right, ref in self._merged_by_row.get(line, ()):
            first = 1 if line == top else 0
            lacking = [n for place, n in names.items() if left + first <= place + 1 <= right]
            if lacking:
                return (
                    f"has no value of its own in column {lacking[0]!r} (row {line} of the sheet): "
                    f"the cells {ref} are merged, and their value belongs to the first one alone; "
                    "unmerge them, and fill the value down"
                )
        return None


def _read_layout(sheet: Any, name: str, lines: Sequence[int]) -> _Layout:
    found, line = _Layout(lines), 0
    bounds = import_module("openpyxl.utils").range_boundaries
    try:
        with open_xml(sheet) as file:
            for _, node in import_module("openpyxl.xml.functions").iterparse(file):
                kind, get = node.tag.rpartition("}")[2], node.attrib.get
                if kind == "row":
                    line = int(get("r") or line + 1)
                    if get("hidden") in _TRUE or get("ht") in ("0", "0.0"):
                        found.rows.add(line)
                elif kind == "col" and (get("hidden") in _TRUE or get("width") in ("0", "0.0")):
                    found.columns.append((int(get("min")), int(get("max"))))
                elif kind == "mergeCell":
                    left, top, right, bottom = bounds(get("ref"))
                    found.merged.append((top, left, bottom, right, get("ref")))
                elif kind == "autoFilter":
                    found.filtered = True
                # Values are not needed here, and a sheet may be large.
                if kind in ("row", "c"):
                    node.clear()
    # As on reading its cells.
    except Exception as error:
        raise ConfigError(_damaged(name)) from error
    return found
