"""The recorded measurements, predicted again."""

import importlib
import statistics
from pathlib import Path

import pytest

from lightning_peft.plan.margins import OVER, UNDER

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def grid():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("planner_grid")


def test_the_records_are_those_of_the_grid(grid):
    rows = grid.records("cpu")["rows"]
    assert len(rows) == len(grid.grid()) >= 24
    assert [{k: v for k, v in row.items() if k != "measured"} for row in rows] == grid.grid()


# The grid changes one thing after the other, so that every fifth row still has all of them.
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_predictions_are_as_near_to_the_records_as_is_said(grid, every):
    off = grid.errors(grid.records("cpu")["rows"][::every], "cpu")
    assert statistics.median(map(abs, off)) <= 0.10
    assert max(map(abs, off)) <= 0.25
    assert min(off) >= -0.10
    # The interval that is shown holds every row.
    assert min(off) >= -UNDER["cpu"]
    assert max(off) <= OVER["cpu"]


def test_the_page_has_the_recorded_rows(grid):
    page = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    table = page.partition("<!-- cpu table begins -->")[2].partition("<!-- cpu table ends -->")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    rows = grid.records("cpu")["rows"]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row["model"]
        assert cells[7] == f"{row['measured'] / 1e6:.1f}"
