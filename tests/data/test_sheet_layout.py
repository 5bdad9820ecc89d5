"""What a workbook hides, merges or leaves out is named, or refused with its cell."""

import datetime
import tracemalloc

import openpyxl
import pytest
from openpyxl.utils import get_column_letter
from openpyxl.worksheet.formula import ArrayFormula

from lightning_peft.data.charsets import near_encodings
from lightning_peft.data.json_text import json_type
from lightning_peft.data.reading import Source
from lightning_peft.data.sheets import _text
from lightning_peft.errors import ConfigError

TABLE = [["prompt", "completion", "note"]]
TABLE += [[f"ask {n}", f"say {n}", f"n{n}"] for n in range(1, 5)]


@pytest.fixture
def read(tmp_path):
    """Writes a workbook with a table that ``change`` changes, and reads it."""

    def read(change, table=TABLE):
        book = openpyxl.Workbook()
        for row in table:
            book.active.append(row)
        change(book, book.active)
        book.save(tmp_path / "a.xlsx")
        source = Source(str(tmp_path / "a.xlsx"))
        return list(source.rows()), source.file_formats()["a.xlsx"].notes

    return read


def hide_rows(*rows):
    def hide(book, sheet):
        for row in rows:
            sheet.row_dimensions[row].hidden = True

    return hide


def test_hidden_rows_are_read_and_named(read):
    rows, notes = read(hide_rows(3))
    assert len(rows) == 4
    assert notes == ("1 hidden row is read: row 3 of the sheet",)

    def filtered(book, sheet):
        hide_rows(2, 3, 5)(book, sheet)
        sheet.auto_filter.ref = "A1:C5"

    assert read(filtered)[1] == (
        "3 hidden rows are read (by hand or by a filter): rows 2, 3, 5 of the sheet",
    )
    # A hidden row without values is not a row.
    assert read(hide_rows(9))[1] == ()
    long = [TABLE[0], *[["a", "b", "c"]] * 20]
    (note,) = read(hide_rows(*range(2, 22)), long)[1]
    assert note.startswith("20 hidden rows are read: rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... of")


def test_hidden_columns_and_sheets_are_named(read):
    def columns(book, sheet):
        sheet.column_dimensions.group("B", "C", hidden=True)

    rows, notes = read(columns)
    assert rows[0].value == {"prompt": "ask 1", "completion": "say 1", "note": "n1"}
    assert notes == ("hidden columns are read: 'completion', 'note'",)

    def right_of_rows(book, sheet):
        other = book.create_sheet("Old")
        other.append(["prompt", "completion"])
        other.sheet_state = "hidden"

    assert read(right_of_rows)[1] == ("other sheets are not read: Old (hidden)",)

    def alone(book, sheet):
        book.create_sheet("Empty")
        sheet.sheet_state = "veryHidden"

    assert read(alone)[1] == ("the sheet is hidden",)


@pytest.mark.parametrize(
    ("cells", "row", "column"),
    [("A2:A3", 2, "prompt"), ("B2:C2", 1, "note"), ("B3:C4", 2, "note"), ("A4:B5", 4, "prompt")],
)
def test_rows_without_a_value_of_their_own_in_merged_cells(cells, row, column, read):
    rows, _ = read(lambda book, sheet: sheet.merge_cells(cells))
    problem = rows[row - 1].problem
    assert f"column {column!r} (row {row + 1} of the sheet): the cells {cells} are merg" in problem
    assert rows[0].problem is None or row == 1


def test_merged_cells_of_whole_columns_cost_no_more_than_the_rows(read):
    def merge(book, sheet):
        for column in range(10, 50):
            letter = get_column_letter(column)
            sheet.merged_cells.add(f"{letter}10:{letter}1048576")

    tracemalloc.start()
    rows, _ = read(merge)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.problem for row in rows] == [None] * 4
    # An entry for each line of one range alone would be a hundred times that.
    assert peak < 20_000_000


def test_merged_cells_outside_the_rows_are_ignored(read):
    rows, notes = read(lambda book, sheet: sheet.merge_cells("E2:F5"))
    assert [row.problem for row in rows] == [None] * 4
    assert notes == ()


@pytest.mark.parametrize(
    ("cell", "value", "problem"),
    [
        ("B2", "=A2", "a formula in column 'completion' (cell B2) whose value is not in the file"),
        ("B2", ArrayFormula("B2:B3", "=A2:A3"), "a formula in column 'completion' (cell B2)"),
        ("C2", "#REF!", "has the error #REF! in column 'note' (cell C2)"),
        ("F2", "x", "has a value in cell F2, to the right of the 3 column names"),
    ],
)
def test_cells_that_have_no_value_to_read(cell, value, problem, read):
    rows, _ = read(lambda book, sheet: sheet.__setitem__(cell, value))
    assert problem in rows[0].problem
    assert [row.problem for row in rows[1:]] == [None] * 3


def test_numbers_that_the_cell_shows_in_another_form_are_named(read):
    def set_it(book, sheet):
        sheet["B2"] = 0.5
        sheet["B2"].number_format = "0%"

    rows, notes = read(set_it)
    assert rows[0].value["completion"] == "0.5"
    assert "column 'completion': 1 numbers that Excel shows as '0%' as text" in notes

    def set_whole(book, sheet):
        sheet["B2"], sheet["B3"] = 2.5, 2
        sheet["B2"].number_format = sheet["B3"].number_format = "0"

    (note,) = read(set_whole)[1]
    assert "1 numbers that Excel shows as '0', 1 numbers as text" in note


def test_durations_are_the_hours_that_the_cell_shows(read):
    def set_it(book, sheet):
        sheet["B2"] = datetime.timedelta(hours=30, minutes=5)

    assert read(set_it)[0][0].value["completion"] == "30:05:00"


@pytest.mark.parametrize(
    ("shown", "value"),
    [
        ("-1:30:00", {"minutes": -90}),
        ("0:00:01.25", {"seconds": 1.25}),
        ("0:01:00", {"minutes": 1}),
    ],
)
def test_durations_keep_their_sign_and_fractions(shown, value):
    assert _text(datetime.timedelta(**value)) == shown


@pytest.mark.parametrize("title", [["About"], ["About", "of May"], ["About", None, "of May"]])
def test_names_below_a_title_are_refused(title, read):
    with pytest.raises(ConfigError, match=r"names of columns in row 3 of the sheet 'Sheet'.*About"):
        read(lambda book, sheet: None, [title, [], *TABLE])
    rows, _ = read(lambda book, sheet: None, [[], [], *TABLE])
    assert rows[0].value == {"prompt": "ask 1", "completion": "say 1", "note": "n1"}


@pytest.mark.parametrize(
    ("value", "what"), [("=A9", "a formula whose value"), ("#NAME?", "the error #NAME")]
)
def test_names_of_columns_that_are_not_text(value, what, read):
    with pytest.raises(ConfigError, match=rf"has {what}.*cell B1.*Write the name itself"):
        read(lambda book, sheet: sheet.__setitem__("B1", value))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("cp1525", "cp1252"),
        ("utf8-sig", "utf-8-sig"),
        ("utf-9", "utf-8"),
        ("latn1", "latin-1"),
        ("windws-1252", "windows-1252"),
        ("shiftjs", "shift-jis"),
        ("koi8", "koi8-r"),
    ],
)
def test_misspelled_encodings_have_near_names(wrong, right, tmp_path):
    assert near_encodings(wrong)[0] == right
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\n")
    source = Source(str(tmp_path / "a.csv"), encoding=wrong)
    with pytest.raises(ConfigError, match=rf"'{wrong}' is not an encoding .* Near names: {right}"):
        list(source.rows())


def test_names_of_kinds_of_values():
    values = ["", True, 1, 1.5, [], {}, None, b"", datetime.date(2024, 1, 1), object()]
    assert [json_type(value) for value in values] == [
        *("a text", "true or false", "a number", "a number", "a list", "an object", "null"),
        *("bytes", "a date or time", "a value"),
    ]


def test_columns_that_the_user_maps_are_names_as_well(tmp_path):
    book = openpyxl.Workbook()
    for row in (["frage", "antwort"], ["prompt", "answer"], ["text", "label"]):
        book.active.append(row)
    other = book.create_sheet("Other")
    for row in (["a", "b"], ["1", "2"]):
        other.append(row)
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(ConfigError, match="rows in 2 sheets"):
        list(Source(str(tmp_path / "a.xlsx")).rows())
    columns = {"prompt": "frage", "completion": "antwort"}
    rows = list(Source(str(tmp_path / "a.xlsx"), columns=columns).rows())
    assert [row.value for row in rows] == [
        {"frage": "prompt", "antwort": "answer"},
        {"frage": "text", "antwort": "label"},
    ]
    # A title above names that the user maps is refused as above any other.
    book.active.insert_rows(1)
    book.active["A1"] = "Fragen"
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(ConfigError, match=r"names of columns in row 2 of .* \['Fragen'\]"):
        list(Source(str(tmp_path / "a.xlsx"), sheet=1, columns=columns).rows())
