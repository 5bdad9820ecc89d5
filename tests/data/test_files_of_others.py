"""Random files, written by the writers of Python, pandas, pyarrow and openpyxl, and damaged."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
import zipfile
from pathlib import Path

import openpyxl
import pandas
import pyarrow
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from openpyxl.utils.exceptions import IllegalCharacterError
from properties import few_and_many

from lightning_peft.data.reading import Source
from lightning_peft.errors import ConfigError

NAMES = st.text("abcdefghijklmnopqrstuvwxyz_ABC0123456789", min_size=1, max_size=8)
# No lone surrogates, which no file of text holds; no zeros, which mean another kind of file.
CHARS = st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\x1a")
TEXTS = st.one_of(st.text(CHARS, max_size=20), st.sampled_from(["", "NA", "007", "a,b", '"', "x;"]))
SURE = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
COMPRESSIONS = ["", "gz", "bz2", "xz", "zst", "zip"]
KINDS = ["csv", "jsonl", "json", "parquet", "xlsx", "arrow"]
ODD = "{}[]\",:'\\\n\r\t a1;|-.eE\u00e9#/"


@st.composite
def tables(draw):
    count = draw(st.integers(2, 4))
    names = draw(st.lists(NAMES, min_size=count, max_size=count, unique=True))
    rows = draw(st.lists(st.tuples(*[TEXTS] * count), min_size=1, max_size=6))
    # A row without any value is not a row.
    assume(all(any(row) for row in rows))
    return names, rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(CHARS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(NAMES, JSON, min_size=1, max_size=4), min_size=1, max_size=5)


def compressed(content, how, inner):
    if how == "zip":
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(inner, content)
        return made.getvalue()
    if how == "zst":
        return pyarrow.compress(content, "zstd", asbytes=True)
    return {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[how](content)


def read(name, content, **options):
    """Returns the rows of a file with this content, and how it was read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        source = Source(str(path), **options)
        return list(source.rows()), source.file_formats()[name]


def refused_in_words(name, content):
    """Reads a file, and checks that a refusal names it; another exception fails the test."""
    said = ""
    try:
        read(name, content)
    except ConfigError as error:
        said = str(error)
    assert not said or (name in said and len(said) > len(name) + 25)


@few_and_many(
    table=tables(),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    encoding=st.sampled_from([*SURE, "utf-16-le", "utf-16-be", "cp1252", "latin-1", "cp1251"]),
    how=st.sampled_from(COMPRESSIONS),
)
def test_a_table_is_read_as_it_was_written(table, delimiter, end, quoting, encoding, how):
    names, rows = table
    # Python before 3.13 writes a carriage return without quotes, which is then a line end.
    assume(quoting == csv.QUOTE_ALL or not any("\r" in value for row in rows for value in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([names, *rows])
    try:
        content = text.getvalue().encode(encoding)
    except UnicodeEncodeError:
        assume(False)
    name = "rows.csv" + (how and f".{how}")
    packed = compressed(content, how, "rows.csv")
    if encoding in SURE:
        found, file_format = read(name, packed)
    else:
        # A guess is shown or refused; what the user says holds.
        refused_in_words(name, packed)
        found, file_format = read(name, packed, encoding=encoding)
    assert file_format.encoding_by in ("mark", "sure", "given")
    assert [row.value for row in found] == [dict(zip(names, row, strict=True)) for row in rows]
    assert [row.number for row in found] == list(range(1, len(rows) + 1))
    assert file_format.delimiter == delimiter


LAYOUTS = {
    "lines": lambda rows, dump: "\n".join(map(dump, rows)),
    "list": lambda rows, dump: dump(rows),
    "pretty list": lambda rows, dump: dump(rows, indent=1),
    "one after another": lambda rows, dump: "".join(map(dump, rows)),
    "pretty": lambda rows, dump: "\n".join(dump(row, indent=2) for row in rows),
    "lines with commas": lambda rows, dump: ",\n".join(map(dump, rows)),
    "list in lines": lambda rows, dump: "[\n" + ",\n".join(map(dump, rows)) + "\n]",
}


@few_and_many(
    rows=ROWS,
    layout=st.sampled_from(list(LAYOUTS)),
    encoding=st.sampled_from(SURE),
    how=st.sampled_from(COMPRESSIONS),
    ascii_only=st.booleans(),
    suffix=st.sampled_from(["json", "jsonl"]),
)
def test_json_is_read_in_any_layout(rows, layout, encoding, how, ascii_only, suffix):
    # One object alone in .json may also be a table by columns.
    assume(len(rows) > 1 or suffix == "jsonl" or "list" in layout)
    text = LAYOUTS[layout](rows, lambda v, **k: json.dumps(v, ensure_ascii=ascii_only, **k))
    name = f"rows.{suffix}" + (how and f".{how}")
    found, _ = read(name, compressed(text.encode(encoding), how, f"rows.{suffix}"))
    assert [row.value for row in found] == rows


NAMED = [f"a.{kind}" for kind in (*KINDS, "tsv", "txt", "csv.gz", "json.zst", "jsonl.xz", "zip")]


@few_and_many(content=st.binary(max_size=200), name=st.sampled_from(NAMED))
def test_bytes_of_no_kind_are_refused_in_words(content, name):
    refused_in_words(name, content)


@few_and_many(text=st.text(st.sampled_from(ODD), max_size=60), name=st.sampled_from(NAMED[:3]))
def test_marks_without_sense_are_refused_in_words(text, name):
    refused_in_words(name, text.encode())


def written(kind, names, rows):
    """Returns a table as pandas, pyarrow or openpyxl write it."""
    frame, out = pandas.DataFrame(rows, columns=names), io.BytesIO()
    if kind == "arrow":
        table = pyarrow.Table.from_pandas(frame)
        with pyarrow.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    elif kind == "xlsx":
        book = openpyxl.Workbook()
        for row in [names, *rows]:
            book.active.append(row)
        book.save(out)
    else:
        options = {"csv": {"index": False}, "jsonl": {"orient": "records", "lines": True}}
        name = "to_json" if kind == "jsonl" else f"to_{kind}"
        getattr(frame, name)(out, **options.get(kind, {}))
    return out.getvalue()


@few_and_many(
    table=tables(),
    kind=st.sampled_from(KINDS),
    how=st.sampled_from(COMPRESSIONS),
    share=st.floats(0, 1),
    byte=st.none() | st.integers(0, 255),
)
def test_damaged_files_are_refused_in_words(table, kind, how, share, byte):
    try:
        content = compressed(written(kind, *table), how, f"rows.{kind}")
    except IllegalCharacterError:
        assume(False)
    place = int(len(content) * share)
    kept = content[:place] if byte is None else content[:place] + bytes([byte])
    rest = b"" if byte is None else content[place + 1 :]
    refused_in_words(f"rows.{kind}" + (how and f".{how}"), kept + rest)


@few_and_many(table=tables(), kind=st.sampled_from(["json", "parquet", "arrow"]))
def test_what_pandas_and_pyarrow_write_is_read(table, kind):
    names, rows = table
    found, _ = read(f"rows.{kind}", written(kind, names, rows))
    assert [row.value for row in found] == [dict(zip(names, row, strict=True)) for row in rows]


def test_a_zero_after_the_last_whole_character_is_named():
    with pytest.raises(ConfigError, match="holds bytes that are not text .a zero at byte 5"):
        read("a.csv", b"\x01\x01\x01\x01\x00")
