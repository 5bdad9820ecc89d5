"""Private parts of openpyxl.

- ``ReadOnlyWorksheet._get_source``: waits for hidden rows and merged cells in ``read_only`` mode.
"""

from __future__ import annotations

from typing import Any


def open_xml(sheet: Any) -> Any:
    """Returns the XML of a sheet that is read row by row, as an open file."""
    return sheet._get_source()
