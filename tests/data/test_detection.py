"""Encodings, delimiters, quotes, sheets and layouts that are detected, shown, or refused."""

import bz2
import datetime
import gzip
import json
import logging
import zipfile

import openpyxl
import pandas
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from pyarrow import parquet

from lightning_peft.data.reading import Source, check_unchanged, file_stamps, stored_rows
from lightning_peft.errors import ConfigError

TABLE = [{"prompt": "Wo liegt Köln?", "completion": "Am Rhein"}, {"prompt": "b", "completion": "2"}]


@pytest.fixture
def read(tmp_path):
    """Reads a file with this content: rows, and how they were read."""

    def read(name, content, **options):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        source = Source(str(path), **options)
        rows = list(source.rows())
        return rows, source.file_formats()[name]

    return read


def values(found):
    return [row.value for row in found[0]]


GUESSES = [
    ("cp1252", "prompt,completion\nWo ist das Café?,In Zürich – “gut” 5 €\n"),
    ("cp1252", "prompt,completion\nOù est l’élève naïf?,Ça va déjà très bien\n"),
    ("cp1252", "prompt,completion\nGREEN CAFÉ?,não são niño på ø æ å\n"),
    ("cp1250", "prompt,completion\nCo to jest żółw?,Gad z pancerzem. Łódź\n"),
    (
        "cp1250",
        "prompt,completion\nČeština je krásná řeč?,kůň běží přes pole a děti se smějí\n" * 2,
    ),
    ("cp1251", "prompt,completion\nКакая столица России?,Москва конечно\n"),
    ("koi8_r", "prompt,completion\nКакая столица России?,Москва конечно\n"),
    ("cp932", "prompt,completion\nこれは何ですか,これは日本語の本です\n"),
    ("gb18030", "prompt,completion\n这是什么东西呢,这是一本很好的书，我们在学校里学习中文和历史\n"),
    ("mac_roman", "prompt,completion\nWo ist das Café in der Straße?,In Zürich sehr schön\n"),
    ("cp850", "prompt,completion\nWo ist das Café in der Straße?,In Zürich sehr schön\n"),
]


@pytest.mark.parametrize(("encoding", "text"), GUESSES)
def test_an_encoding_is_guessed_and_the_guess_is_shown(read, encoding, text):
    found, how = read("a.csv", text.encode(encoding))
    assert (how.encoding, how.encoding_by, how.is_standard) == (encoding, "guessed", False)
    first = text.splitlines()[1].partition(",")[0]
    assert found[0].value["prompt"] == first
    assert f"in {encoding} by a guess (a line of it: {how.example})" in how.describe()
    assert first[:8] in how.example
    assert 'say encoding=, such as encoding="cp1250"' in how.describe()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "txt"])
def test_unicode_is_known_by_its_bytes(read, encoding, suffix):
    text = {
        "csv": "prompt,completion\nWo liegt Köln?,Am Rhein\nb,2\n",
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in TABLE),
        "json": json.dumps(TABLE, ensure_ascii=False),
        "txt": "Wo liegt Köln?\nb",
    }[suffix]
    found = read(f"a.{suffix}", text.encode(encoding))
    expected = [{"text": row["prompt"]} for row in TABLE] if suffix == "txt" else TABLE
    assert values(found) == expected
    assert found[1].encoding_by in ("mark", "sure")


def test_too_little_to_guess_from_is_refused_with_the_choices(read):
    with pytest.raises(ConfigError, match="Say which encoding reads it right") as error:
        read("a.csv", "prompt,completion\nПривет,Да\n".encode("cp1251"))
    assert "encoding='cp1251': 'Привет,Да'" in str(error.value)
    assert "iconv -f CP1251 -t UTF-8 a.csv > utf8-a.csv" in str(error.value)
    found = read("a.csv", None, encoding="cp1251")
    assert values(found) == [{"prompt": "Привет", "completion": "Да"}]
    assert "in cp1251 as asked for" in found[1].describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoding": "cp-125x"},
            "encoding='cp-125x' is not an encoding of Python. Near names: cp125",
        ),
        ({"encoding": "ascii"}, "'a.csv' is not in encoding='ascii': byte 29 does not exist in it"),
        ({"delimiter": "::"}, "delimiter='::' is not one character that parts columns"),
    ],
)
def test_a_wrong_override_is_refused(read, options, message):
    with pytest.raises(ConfigError) as error:
        read("a.csv", "prompt,completion\nWo liegt Köln?,x\n", **options)
    assert message in str(error.value)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^", "\x01"])
def test_delimiters_are_detected(read, delimiter):
    text = f'prompt{delimiter}completion\n"a{delimiter}b, c; d"{delimiter}1\nx, y; z{delimiter}2\n'
    if delimiter in ",;":
        text = text.replace("x, y; z", "x")
    found = read("a.csv", text)
    assert values(found)[0] == {"prompt": f"a{delimiter}b, c; d", "completion": "1"}
    assert found[1].delimiter == delimiter
    assert values(read("a.csv", None, delimiter=delimiter))[1]["completion"] == "2"


def test_a_table_with_commas_in_a_file_for_tabs_and_a_line_of_excel(read):
    assert values(read("a.tsv", "a,b\n1,2\n")) == [{"a": "1", "b": "2"}]
    assert values(read("b.csv", "sep=;\r\na;b\r\n1,5;2\r\n")) == [{"a": "1,5", "b": "2"}]
    assert values(read("c.csv", '"a", "b"\n"1, 2", "3"\n')) == [{"a": "1, 2", "b": "3"}]
    assert values(read("d.csv", "'a','b'\n'1, 2','it''s'\n")) == [{"a": "1, 2", "b": "it's"}]


@pytest.mark.parametrize(
    ("text", "expected", "note"),
    [
        (
            ",a,b\n0,x,y\n1,z,w\n",
            [("x", "y"), ("z", "w")],
            "first column has no name and is an ind",
        ),
        # R's write.csv, and its write.table, which gives the row names no column name.
        ('"","a","b"\n"1","x","y"\n"2","z","w"\n', [("x", "y"), ("z", "w")], "is an index"),
        ('"a","b"\n"1","x","y"\n"2","z","w"\n', [("x", "y"), ("z", "w")], "no column name and is"),
        # Sheets that were larger once.
        ("a,b,,\nx,y,,\n,,,\nz,w,,\n", [("x", "y"), ("z", "w")], "1 rows without any value"),
        ("a,b\nx,y,\nz,w,\n", [("x", "y"), ("z", "w")], ""),
        ("a,b\nx\nz,w\n", [("x", ""), ("z", "w")], "fewer fields than columns (first 1)"),
    ],
)
def test_indexes_and_empty_columns_are_named_and_left_out(read, text, expected, note):
    found = read("a.csv", text)
    assert values(found) == [{"a": a, "b": b} for a, b in expected]
    assert note in found[1].describe()


def test_a_nameless_column_of_text_keeps_a_name(read):
    assert values(read("a.csv", ",a\nx,1\ny,2\n"))[0] == {"Unnamed: 0": "x", "a": "1"}


def test_a_row_with_too_many_fields_does_not_hide_others(read):
    found, _ = read("a.csv", 'a,b\n1,2\n3, so,4\n"5, 6",7\n')
    assert [row.value for row in found] == [{"a": "1", "b": "2"}, None, {"a": "5, 6", "b": "7"}]
    assert "has 3 fields below 2 column names (line 3): a value that holds" in found[1].problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'a,b\n1,2\n3,"x\n4,5\n',
            r"a quote that is never closed in line 3, field 2\. .*sed -n 3p a",
        ),
        ('a,b\n"x"y,2\n', "text after the quote that ends a value in line 2, field 1"),
        ('a,b\n"a \\"b\\"","c\\d"\n', "other backslashes too, first in line 2"),
        ("a,b\nx\ry,1\nz,2\n", "a carriage return alone in line 2, and line feeds"),
        ("My report\nprompt,completion\nx,y\n", r"tail -n \+2 a.csv > rows.csv"),
        ('{"prompt": 1}\n', "begins like JSON.*mv a.csv a.jsonl"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("<!DOCTYPE html>\n<p>", "a page of HTML.*login page"),
        ("", "There are no rows in 'a.csv'"),
        (" \n", "There are no rows in 'a.csv'"),
        (b"a,b\n\x00\x01\x02\xff\xfe,\x00\x00\x81", "bytes that are not text"),
        ("a,b\nö,1\n".encode() + b"\xc3\n", "damaged bytes, first in line 3.*iconv -c"),
    ],
)
def test_tables_that_cannot_be_read_are_refused_with_place_and_remedy(read, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        read("a.csv", text)
    assert type(error.value) is ConfigError
    assert "a.csv" in str(error.value)


def test_quotes_with_backslashes_are_read_where_that_is_sure(read):
    found = read("a.csv", 'a,b\n"say \\"hi\\", x",1\n')
    assert values(found) == [{"a": 'say "hi", x', "b": "1"}]
    assert "have a backslash before them" in found[1].describe()


def test_long_values_and_old_line_ends_are_read(read):
    text = "word " * 100_000
    assert values(read("a.csv", f"a,b\r{text},1\r"))[0] == {"a": text, "b": "1"}


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst", ".zip"])
def test_compression_is_known_by_bytes_whatever_the_name(read, tmp_path, suffix):
    content = b"a,b\n1,2\n"
    packed = {
        "": gzip.compress,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": lambda c: pyarrow.compress(c, "zstd", asbytes=True),
    }
    if suffix == ".zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("__MACOSX/._a.csv", "x")
            archive.writestr("folder/a.csv", content)
        found = read("a.zip", None)
    else:
        found = read(f"a.csv{suffix}", packed[suffix](content))
    assert values(found) == [{"a": "1", "b": "2"}]
    assert "compressed by " in found[1].describe()


def test_archives_that_are_cut_or_hold_several_files_are_refused(read, tmp_path):
    with pytest.raises(ConfigError, match=r"breaks off as gzip \(gzip -t a.csv.gz says where\)"):
        read("a.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 1000)[:-12])
    zst = pyarrow.compress(b"a,b\n" + bytes(range(32, 127)) * 99, "zstd", asbytes=True)
    with pytest.raises(ConfigError, match="breaks off as zstd"):
        read("a.csv.zst", zst[:-20])
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.csv", "a\n1")
        archive.writestr("b.csv", "a\n1")
    with pytest.raises(ConfigError, match="holds 2 files.*\n.*unzip b.zip -d rows|unzip b.zip -d"):
        read("b.zip", None)
    for name, what in [("a.xls", "old Excel"), ("a.ods", "LibreOffice"), ("a.tar.gz", "tar -xf")]:
        with pytest.raises(ConfigError, match=what):
            read(name, b"x")


@pytest.mark.parametrize(
    "write",
    [
        lambda frame: frame.to_json(),
        lambda frame: frame.to_json(orient="split"),
        lambda frame: frame.to_json(orient="index"),
        lambda frame: frame.to_json(orient="table"),
        lambda frame: frame.to_json(orient="records"),
        lambda frame: json.dumps(frame.to_dict("list")),
        lambda frame: json.dumps(
            {"features": [], "rows": [{"row_idx": 0, "row": r} for r in frame.to_dict("records")]}
        ),
    ],
)
def test_json_of_pandas_and_of_the_hub_is_read(read, write):
    found = values(read("a.json", write(pandas.DataFrame(TABLE))))
    assert [{name: row[name] for name in ("prompt", "completion")} for row in found] == TABLE


def test_lists_for_each_split_are_read_as_such(read):
    found, _ = read("a.json", json.dumps({"train": TABLE, "dev": [{"prompt": "c"}]}))
    assert [row.split for row in found] == ["train", "train", "validation"]
    found, _ = read("b.json", '{"features": [], "rows": [{"row": {}, "truncated_cells": ["a"]}]}')
    assert found[0].problem.startswith("was cut by the viewer of the hub in a")
    assert values(read("c.json", '{"messages": [{"role": "user", "content": "x"}]}')) == [
        {"messages": [{"role": "user", "content": "x"}]}
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": "x", "b": ', "is cut off after '"),
        ('{"a": "half', "is cut off after "),
        ("{'a': 1}", "single quotes, and JSON has double ones"),
        ('{"a": 1} x', "something follows after the end of the value"),
        ('{"a": "x\ty"}', "a raw line end, tab or other control character"),
        ('{"a": "C:\\d"}', "a backslash that escapes nothing"),
        ('{"a": 1,}', "a comma before it that nothing follows"),
        ("// a comment", "a comment, which JSON does not have"),
        ('{"a": None}', "a word that is not of JSON"),
        ('{"a": "say "hi""}', "a quote inside the text is not written"),
        ('{"a": 1, "a": 2}', "names 'a' twice in one object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "a number of too many digits"),
        (
            '{"a": {"b": ["ok", "x\\ud83d"]}}',
            r"half of a surrogate pair (\ud83d) as character 2 of a",
        ),
        ('"text"', "is a text, not an object with named fields"),
    ],
)
def test_lines_that_are_not_json_are_explained(read, line, problem):
    found, _ = read("a.jsonl", f'{{"a": 1}}\n{line}\n{{"a": NaN}}\n')
    assert [row.value for row in found] == [{"a": 1}, None, {"a": None}]
    assert problem in found[1].problem
    assert "Expecting" not in found[1].problem


def test_a_list_with_one_damaged_row_in_lines_keeps_the_others(read):
    found, _ = read("a.json", '[\n{"a": 1},\n{"a": 2\n,\n{"a": 3}\n]')
    assert [row.value for row in found if row.value] == [{"a": 1}, {"a": 3}]
    with pytest.raises(ConfigError, match=r"'b.json' is cut off .*in line 3"):
        read("b.json", '[{"a":\n1},\n{"a": ')


def test_parquet_of_all_types_is_read(read, tmp_path):
    table = pyarrow.table(
        {
            "text": pyarrow.array(["a", None], pyarrow.large_string()),
            "kind": pyarrow.array(["x", "y"]).dictionary_encode(),
            "turns": [[{"role": "user", "content": "q"}], []],
            "day": pyarrow.array([datetime.date(2024, 5, 1), None]),
            "time": pyarrow.array([10**17 + 1, 0], pyarrow.timestamp("ns")),
            "map": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "gap": [1.5, float("nan")],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = values(read("a.parquet", None))
    assert (first["text"], first["kind"], second["text"], second["gap"]) == ("a", "x", None, None)
    assert first["turns"] == [{"role": "user", "content": "q"}]
    assert first["map"] == {"k": 1}
    assert first["day"] == datetime.date(2024, 5, 1)
    assert str(first["time"]).startswith("1973-03-03 09:46:40.00000000")
    frame = pandas.DataFrame({"a": ["x"]}, index=["name"])
    frame.to_parquet(tmp_path / "b.parquet")
    found = read("b.parquet", None)
    assert (values(found), found[1].notes[0][:30]) == (
        [{"a": "x"}],
        "the column '__index_level_0__'",
    )


def test_parquet_that_is_damaged_or_ambiguous_is_refused(read, tmp_path):
    names = pyarrow.table([["a"], ["b"]], names=["x", "x"])
    parquet.write_table(names, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has the columns \['x'\] twice"):
        read("a.parquet", None)
    bad = pyarrow.array([b"ok", b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"t": bad, "n": [1, 2]}), tmp_path / "b.parquet")
    found, _ = read("b.parquet", None)
    assert (found[0].value, found[1].value) == ({"t": "ok", "n": 1}, None)
    assert (
        found[1].problem == "has text that is not UTF-8 in column 't' that cannot be read (string)"
    )
    with pytest.raises(ConfigError, match="'c.parquet' cannot be read as parquet: it is damaged"):
        read("c.parquet", (tmp_path / "b.parquet").read_bytes()[:-40])


def test_a_dataset_saved_by_the_library_is_read_with_its_classes(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "kept")
    rows.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "kept", tmp_path / "a.parquet"):
        source = Source(str(path))
        found = [row.value for row in source.rows()]
        assert found == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]


def test_tags_are_read_with_the_names_of_their_classes(tmp_path):
    """Named-entity data keeps tags as numbers in lists; models were trained without their names."""
    tags = {"ner_tags": List(ClassLabel(names=["O", "B-PER"]))}
    meta = {**tags, "note": Value("string")}
    features = Features({"tokens": List(Value("string")), **tags, "meta": meta})
    row = {"tokens": ["Ada", "sat"], "ner_tags": [1, 0], "meta": {"ner_tags": [-1], "note": None}}
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "a.parquet")
    names = {"ner_tags": ["B-PER", "O"], "meta": {"ner_tags": [None]}}
    assert [r.value for r in Source(str(tmp_path / "a.parquet")).rows()] == [{**row, **names}]
    loaded = Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "c"))
    assert list(stored_rows(loaded, "some/data")) == [{**row, **names}]


@pytest.fixture
def book(tmp_path):
    """Writes a workbook of sheets by name."""

    def book(sheets, name="a.xlsx"):
        made = openpyxl.Workbook()
        made.remove(made.active)
        for title, rows in sheets.items():
            sheet = made.create_sheet(title)
            for row in rows:
                sheet.append(row)
        made.save(tmp_path / name)
        return made

    return book


ROWS = [["prompt", "completion"], ["a", 4], [None, None], ["b", 0.5], ["c", True]]


def test_a_sheet_is_read_as_text_and_the_choice_is_shown(read, book):
    book({"About": [["Made by"]], "Rows": [[None], *ROWS]})
    found = read("a.xlsx", None)
    assert values(found) == [
        {"prompt": "a", "completion": "4"},
        {"prompt": "b", "completion": "0.5"},
        {"prompt": "c", "completion": "TRUE"},
    ]
    words = found[1].describe()
    assert words.startswith("Excel, sheet 'Rows'; 1 rows without any value are left out")
    assert "column 'completion': 2 numbers, 1 truth values as text" in words
    assert "other sheets are not read: About" in words


def test_sheets_that_both_have_rows_are_a_question(read, book):
    book({"First": ROWS, "Second": [["prompt", "completion"], ["d", "x"]]})
    with pytest.raises(ConfigError, match=r"rows in 2 sheets: First, Second.*sheet='First'"):
        read("a.xlsx", None)
    for sheet in ("Second", 2, "2"):
        assert values(read("a.xlsx", None, sheet=sheet)) == [{"prompt": "d", "completion": "x"}]
    with pytest.raises(ConfigError, match="has no sheet 'Secnd'; near names: Second"):
        read("a.xlsx", None, sheet="Secnd")


def test_formulas_without_values_and_errors_are_problems_of_their_rows(read, book):
    rows = [
        ["prompt", "completion"],
        ["a", "=1+1"],
        ["b", "#N/A"],
        ["c", datetime.date(2024, 5, 1)],
    ]
    book({"Rows": rows})
    found, how = read("a.xlsx", None)
    assert (
        "has a formula in column 'completion' (cell B2) whose value is not in" in found[0].problem
    )
    assert found[1].problem == "has the error #N/A in column 'completion' (cell B3)"
    assert found[2].value == {"prompt": "c", "completion": "2024-05-01"}
    assert "1 dates or times as text" in how.describe()
    with pytest.raises(ConfigError, match="cannot be read as a workbook of Excel"):
        read("b.xlsx", b"PK\x03\x04 nothing")


def test_how_files_are_read_is_logged_and_kept(make, tmp_path, caplog):
    (tmp_path / "a.csv").write_bytes(
        "prompt;completion\nWo ist Köln?;Am Rhein\nUnd Ulm?;An der Donau\n".encode("cp1252")
    )
    data = make(str(tmp_path / "a.csv"), validation_share=0)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert "Read as:\n  - a.csv: CSV, in cp1252 by a guess (a line of it: 'Wo ist" in caplog.text
    (one,) = data.record["read_as"]
    assert (one["file"], one["encoding"], one["delimiter"]) == ("a.csv", "cp1252", ";")
    caplog.clear()
    again = make(str(tmp_path / "a.csv"), validation_share=0, encoding="cp1252", delimiter=";")
    with caplog.at_level(logging.WARNING):
        again.setup("fit")
    assert "in cp1252 as asked for, columns parted by semicolons" in caplog.text


def test_lists_and_turns_in_cells_are_read(make, tmp_path):
    turns = [{"role": "user", "content": "q's"}, {"role": "assistant", "content": "a"}]
    other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}]
    frame = pandas.DataFrame({"messages": [json.dumps(turns), str(other)]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert make(str(tmp_path / "a.csv"), validation_share=0).read().problems == []
    printed = str([turns[0]])[:-1] + "\n " + str(turns[1]) + "]"
    rows = [json.dumps({"messages": text}) for text in (printed, "[{'role': ", "[1]")]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    problems = make(str(tmp_path / "b.jsonl"), validation_share=0).read().problems
    assert "is a printed array of NumPy, which leaves out the commas" in problems[0].detail
    assert "has text as messages that is not JSON" in problems[1].detail
    # An answer in JSON is an answer.
    answer = {"prompt": "List it.", "completion": '[{"a": 1}]'}
    (tmp_path / "c.jsonl").write_text(json.dumps(answer))
    row = make(str(tmp_path / "c.jsonl"), validation_share=0).read().splits["train"][0]
    assert row["row"] == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    source = Source(str(path))
    before = file_stamps([source])
    check_unchanged(before, file_stamps([source]))
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ConfigError, match="a.jsonl changed while the rows were read"):
        check_unchanged(before, file_stamps([source]))
