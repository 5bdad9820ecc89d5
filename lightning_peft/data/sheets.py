"""Rows of a sheet of an Excel workbook."""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_peft.data.file_format import FileFormat, FileRow, ReadableFile
from lightning_peft.data.open_files import explain_errors, explained_rows
from lightning_peft.data.shapes import FIELDS
from lightning_peft.data.sheet_layout import SheetLayout, read_layout
from lightning_peft.data.table_columns import Columns, TableScan, resolve_columns
from lightning_peft.errors import ConfigError, similar_names

_KNOWN = {name for names in FIELDS.values() for name in names}


def read_sheet(path: Path, name: str, sheet: str | int | None) -> ReadableFile:
    """Opens a sheet by name or number from 1; numbers and dates are read as text, as in CSV.

    Raises:
        ConfigError: If openpyxl is not installed, the workbook is damaged, or it is not known which
            sheet is meant.
    """
    if find_spec("openpyxl") is None:
        raise ConfigError(
            f"{name!r} is a workbook of Excel, which takes openpyxl to read: pip install "
            "'lightning-peft[excel]'. Or save its sheet as CSV (UTF-8)."
        )
    with _book(path, name) as books:
        found = {title: _scan_names(books[0][title]) for title in books[0].sheetnames}
        hidden = {t for t in found if books[0][t].sheet_state != "visible"}
    title = _choose_sheet(found, hidden, name, sheet)
    _refuse_names_below(found[title], name, title)
    columns = resolve_columns(found[title], name, None)
    layout, notes = _scan(path, name, title, columns)
    notes = [*(["the sheet is hidden"] if title in hidden else []), *columns.notes, *notes]
    others = [
        f"{other} (hidden)" if other in hidden else other
        for other in found
        if other != title and found[other].header
    ]
    if others:
        notes.append(f"other sheets are not read: {', '.join(others)}")
    format = FileFormat("Excel", sheet=title, notes=tuple(notes))
    return ReadableFile(format, lambda: _rows(path, name, title, columns, layout))


@contextmanager
def _book(path: Path, name: str) -> Iterator[tuple[Any, Any]]:
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
        yield books[0], books[1]
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


def _scan_names(sheet: Any) -> TableScan:
    widths = TableScan()
    for line, row in enumerate(_cells(sheet, sheet.title), start=1):
        record = _texts(row)
        if widths.header or any(value is not None for value in record):
            widths.add(record, line)
            # The names themselves, and a few rows below a title.
            if widths.named is None and widths.rows <= 5 and len(_KNOWN & set(record)) > 1:
                widths.named = line
    return widths


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
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat(*([" "] if isinstance(value, datetime.datetime) else []))
    # Excel writes characters that XML does not have as `_x000D_`.
    return re.sub(r"_x([0-9A-Fa-f]{4})_", lambda found: chr(int(found[1], 16)), str(value))


def _choose_sheet(
    found: dict[str, TableScan], hidden: set[str], name: str, sheet: str | int | None
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
    known = [t for t in full if any(column in _KNOWN for column in found[t].header)]
    for ones in (full, known):
        if len(ones) == 1:
            return ones[0]
    if not full:
        raise ConfigError(f"{name!r} has no rows below a row of column names in any sheet.")
    raise ConfigError(
        f"{name!r} has rows in {len(full)} sheets: {', '.join(full)}. Say which one is meant with "
        f"sheet={full[0]!r}."
    )


def _scan(path: Path, name: str, title: str, columns: Columns) -> tuple[SheetLayout, list[str]]:
    """Returns the layout of a sheet, and notes on hidden cells and conversions to text."""
    kinds: dict[str, dict[str, int]] = {}
    lines = []
    with _book(path, name) as books:
        try:
            layout = read_layout(books[0][title])
        # As on reading its cells.
        except Exception as error:
            raise ConfigError(_damaged(name)) from error
        rows = enumerate(_cells(books[0][title], name), start=1)
        line, header = _header(rows)
        _refuse_formulas(header, line, books[1][title], name)
        for line, row in rows:
            lines += [line] if any(cell.value is not None for cell in row) else []
            for place, column in columns.names.items():
                value = row[place].value if place < len(row) else None
                kind = _kind(value)
                if kind:
                    counts = kinds.setdefault(column, {})
                    counts[kind] = counts.get(kind, 0) + 1
    return layout, layout.notes(lines, columns.names) + [
        f"column {column!r}: {', '.join(f'{n:,} {kind}' for kind, n in counts.items())} as text"
        for column, counts in kinds.items()
    ]


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth values"
    if isinstance(value, int | float):
        return "numbers"
    dates = datetime.datetime | datetime.date | datetime.time | datetime.timedelta
    return "dates or times" if isinstance(value, dates) else ""


def _header(rows: Iterator[tuple[int, Any]]) -> tuple[int, tuple[Any, ...]]:
    """Moves behind the row with the names of the columns, and returns its number and cells."""
    return next((one for one in rows if any(v is not None for v in _texts(one[1]))), (1, ()))


def _refuse_formulas(header: tuple[Any, ...], line: int, formulas: Any, name: str) -> None:
    """Refuses names of columns that a program would have to compute, and wrong ones."""
    own = next(islice(_cells(formulas, name), line - 1, None), ())
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


def _refuse_names_below(scan: TableScan, name: str, title: str) -> None:
    """Refuses a title above the names of the columns that has as many cells as they."""
    below = scan.named
    if below is not None and not _KNOWN & set(scan.header):
        raise ConfigError(
            f"{name!r} has names of columns in row {below} of the sheet {title!r}, below "
            f"{scan.header}. They belong into the first row: delete the rows above them in Excel."
        )


def _rows(
    path: Path, name: str, title: str, columns: Columns, layout: SheetLayout
) -> Iterator[FileRow]:
    with _book(path, name) as books:
        pairs = zip(_cells(books[0][title], name), _cells(books[1][title], name), strict=False)
        started, number = False, 0
        for line, (row, formulas) in enumerate(pairs, start=1):
            record = _texts(row)
            if not started:
                started = any(value is not None for value in record)
                continue
            problem = _cell_problem(row, formulas, columns)
            if problem is None and not any(value is not None for value in record):
                continue
            number += 1
            value = None
            problem = (
                problem or layout.merged_in(line, columns.names) or _outside_problem(row, columns)
            )
            if problem is None:
                value, problem = columns.row(record, line)
            yield FileRow(number, value, problem)


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
