"""The table of the documentation, as far as it can be compared without the packages."""

from __future__ import annotations

from pathlib import Path

from .published import PAGE, pinned


def test_the_table_has_all_tested_packages_in_their_pinned_versions() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line[:2] == "| "]
    shown = dict(rows[2:])
    tested = {path.stem[5:].replace("_", "-") for path in Path(__file__).parent.glob("test_*.py")}
    assert shown.keys() == tested - {"page"}
    assert shown == {package: pinned(package) for package in shown}
