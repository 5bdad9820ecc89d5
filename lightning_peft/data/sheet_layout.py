"""What of a sheet of Excel is hidden or merged, which its values alone do not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

_TRUE = ("1", "true")
_SHOWN = 10


@dataclass
class SheetLayout:
    """Hidden rows and columns, and merged ranges of a sheet, counted from 1.

    A merged range is its first row and column, last row and column, and name.
    """

    rows: list[int] = field(default_factory=list)
    columns: list[tuple[int, int]] = field(default_factory=list)
    merged: list[tuple[int, int, int, int, str]] = field(default_factory=list)
    filtered: bool = False

    def notes(self, lines: Sequence[int], names: dict[int, str]) -> list[str]:
        """Describes what is hidden and read all the same.

        ``lines`` are the rows that are read, ``names`` the columns by place from 0.
        """
        hidden = set(self.rows)
        rows = [line for line in lines if line in hidden]
        hidden_places = {p for a, b in self.columns for p in names if a <= p + 1 <= b}
        columns = [names[place] for place in sorted(hidden_places)]
        found = []
        if rows:
            shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
            by = " (by hand or by a filter)" if self.filtered else ""
            one = len(rows) == 1
            found.append(
                f"{len(rows):,} hidden {'row is' if one else 'rows are'} read{by}: "
                f"{'row' if one else 'rows'} {shown} of the sheet"
            )
        if columns:
            found.append(f"hidden columns are read: {', '.join(map(repr, columns))}")
        return found

    @cached_property
    def _merged_by_row(self) -> dict[int, list[tuple[int, int, int, str]]]:
        found: dict[int, list[tuple[int, int, int, str]]] = {}
        for top, left, bottom, right, ref in self.merged:
            for line in range(top, bottom + 1):
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


def read_layout(sheet: Any) -> SheetLayout:
    """Returns the layout of a sheet of openpyxl that is read row by row."""
    found, line = SheetLayout(), 0
    bounds = import_module("openpyxl.utils").range_boundaries
    with sheet._get_source() as file:
        for _, node in import_module("openpyxl.xml.functions").iterparse(file):
            kind, get = node.tag.rpartition("}")[2], node.attrib.get
            if kind == "row":
                line = int(get("r") or line + 1)
                if get("hidden") in _TRUE or get("ht") in ("0", "0.0"):
                    found.rows.append(line)
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
    return found
