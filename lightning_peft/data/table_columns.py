"""Column names of tables; index columns and empty columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.errors import ConfigError

_EXAMPLES = 5
# What R, pandas, MySQL and Excel write where there is no value, or a wrong formula.
_ABSENT = frozenset(
    (
        *("NA", "N/A", "#N/A", "NULL", "NaN", "nan", "<NA>", "\\N"),
        *("#NAME?", "#REF!", "#VALUE!", "#DIV/0!", "#NUM!"),
    )
)


@dataclass
class TableScan:
    """What one pass over a table has seen.

    ``widths`` counts rows by their number of fields; ``used`` are columns with a value. Of rows,
    ``wide`` are the first with more values than names (number and line), ``narrow`` those with
    fewer, ``blank`` is how many have none. ``index`` indicates whether the first fields ascend, and
    ``counted`` whether by 1. ``absent`` are columns with a program's text for no value.
    """

    header: list[str] = field(default_factory=list)
    rows: int = 0
    widths: Counter[int] = field(default_factory=Counter)
    used: set[int] = field(default_factory=set)
    wide: list[tuple[int, int]] = field(default_factory=list)
    narrow: list[int] = field(default_factory=list)
    blank: int = 0
    index: bool = True
    counted: bool = True
    absent: dict[int, tuple[str, int]] = field(default_factory=dict)
    _last: int | None = None

    def add(self, record: Sequence[Any], line: int) -> None:
        """Takes the next record; the first one has the names."""
        if not self.header:
            self.header = [
                str(name).strip("\ufeff \t\r\n") if name is not None else "" for name in record
            ]
            return
        filled = [place for place, value in enumerate(record) if value not in ("", None)]
        if not filled:
            self.blank += 1
            return
        self.rows += 1
        self.widths[len(record)] += 1
        self.used.update(filled)
        if filled[-1] >= len(self.header) and len(self.wide) < _EXAMPLES:
            self.wide.append((self.rows, line))
        if len(record) < len(self.header) and len(self.narrow) < _EXAMPLES:
            self.narrow.append(self.rows)
        for place in filled:
            if record[place] in _ABSENT:
                self.absent.setdefault(place, (record[place], self.rows))
        self._follow(record[0])

    def _follow(self, value: Any) -> None:
        text = str(value)
        number = int(text) if text.isdecimal() and len(text) < 15 else None
        first = self.rows == 1
        if number is None or (number > 1 if first else number <= (self._last or 0)):
            self.index = False
        self.counted &= self.index and (self.rows == 1 or number == (self._last or 0) + 1)
        self._last = number


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read, by place; rows may have values in ``width`` fields."""

    names: dict[int, str]
    width: int
    empty: str | None
    notes: tuple[str, ...]

    def row(self, record: Sequence[Any], line: int) -> tuple[dict[str, Any] | None, str | None]:
        """Returns the values of a row by name, or why it cannot be read."""
        if len(record) > self.width and any(
            value not in ("", None) for value in record[self.width :]
        ):
            last = record[self.width - 1]
            return None, (
                f"has {len(record)} fields below {self.width} column names (line {line}): a value "
                f"that holds the delimiter must be in quotes, here perhaps near {str(last)[:40]!r}"
            )
        return {
            name: record[place] if place < len(record) else self.empty
            for place, name in self.names.items()
        }, None


def resolve_columns(scan: TableScan, name: str, empty: str | None = "") -> Columns:
    """Returns the columns of a table."""
    header, notes = list(scan.header), []
    shift = _shift(scan, name)
    if shift:
        notes.append("the first field of each row has no column name and is an index: not read")
    names = {place + shift: title for place, title in enumerate(header)}
    for place, title in list(names.items()):
        if title:
            continue
        if place == 0 and scan.index and scan.rows:
            notes.append("the first column has no name and is an index: not read")
            del names[place]
        elif place not in scan.used:
            del names[place]
        else:
            names[place] = f"Unnamed: {place}"
    repeated = [title for title, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"{name!r} has the columns {repeated} twice below the {len(header)} column names "
            f"{header}. Its first line names each column once."
        )
    if scan.blank:
        notes.append(f"{scan.blank:,} rows without any value are left out and not counted")
    if scan.narrow:
        numbers = ", ".join(map(str, scan.narrow))
        notes.append(
            f"rows with fewer fields than columns (first {numbers}): those missing are empty"
        )
    notes += [
        f"column {names[place]!r} has the text {word!r} (first in row {row}): if that means no "
        "value, leave it empty"
        for place, (word, row) in sorted(scan.absent.items())
        if place in names
    ]
    return Columns(names, len(header) + shift, empty, tuple(notes))


def _shift(scan: TableScan, name: str) -> int:
    """Returns 1 where each row begins with an index that has no name, as R writes it."""
    wide = len(scan.header)
    over = {width: count for width, count in scan.widths.items() if width > wide}
    if not over or not any(place >= wide for place in scan.used):
        return 0
    if scan.widths == {wide + 1: scan.rows} and scan.counted and scan.rows > 1:
        return 1
    if sum(over.values()) == scan.rows or (wide == 1 and 2 * sum(over.values()) > scan.rows):
        row, line = scan.wide[0]
        fields = max(over, key=lambda width: over[width])
        book = name.lower().endswith((".xlsx", ".xlsm"))
        drop = "delete its rows in Excel" if book else f"tail -n +{line} {name} > rows.csv"
        raise ConfigError(
            f"{name!r} has {fields} fields in row {row} below the {wide} column names "
            f"{scan.header}. Its first line names each column once; text with the delimiter in it "
            f"is in quotes. Where a title stands above the names: {drop}"
        )
    return 0
