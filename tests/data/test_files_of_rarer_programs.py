"""Files of Java, R, MySQL and Excel that need more than an encoding and a delimiter."""

import gzip
import subprocess
import sys

import pytest

from lightning_peft.errors import ConfigError

from .test_files_of_others import read


def values(name, content):
    rows, read_as = read(name, content)
    return [row.value for row in rows], read_as


def test_halves_of_characters_are_refused_with_a_command_that_joins_them(tmp_path):
    content = b'{"prompt": "\xed\xa0\xbd\xed\xb8\x80 \xc3\xa9", "completion": "b"}\n'

    with pytest.raises(ConfigError, match="two halves .CESU-8.") as refusal:
        values("rows.jsonl", content)

    (tmp_path / "rows.jsonl").write_bytes(content)
    code = str(refusal.value).split('python -c "')[1].split('"')[0]
    words = [sys.executable, "-c", code, "rows.jsonl", "utf8-rows.jsonl"]
    subprocess.run(words, cwd=tmp_path, check=True)
    ((row,), _) = values("rows.jsonl", (tmp_path / "utf8-rows.jsonl").read_bytes())
    assert row == {"prompt": "\U0001f600 é", "completion": "b"}


@pytest.mark.parametrize("encoding", ["utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"])
def test_wide_encodings_without_a_mark_are_read(encoding):
    rows, read_as = values("rows.csv", "prompt,completion\nStraße,grün\n".encode(encoding))

    assert rows == [{"prompt": "Straße", "completion": "grün"}]
    assert read_as.encoding == encoding


def test_a_file_compressed_twice_is_refused():
    content = gzip.compress(gzip.compress(b'{"prompt": "a", "completion": "b"}\n'))

    with pytest.raises(ConfigError, match="compressed twice, not rows.*unpack it once"):
        values("rows.jsonl.gz", content)


def test_a_table_of_r_parted_by_spaces_is_read_without_its_row_names():
    text = '"prompt" "completion"\n"1" "What now?" "Go on."\n"2" "And then?" "Stop."\n'

    rows, read_as = values("rows.csv", text.encode())

    assert rows[0] == {"prompt": "What now?", "completion": "Go on."}
    assert len(rows) == 2
    assert read_as.delimiter == " "


@pytest.mark.parametrize("word", ["NA", "\\N", "#NAME?"])
def test_words_for_missing_values_are_named(word):
    rows, read_as = values("rows.csv", f"prompt,completion\na,b\nc,{word}\n".encode())

    assert rows[1] == {"prompt": "c", "completion": word}
    note = f"column 'completion' has the text {word!r} (first in row 2): if that means no value"
    assert note in read_as.describe()


def test_escapes_of_excel_are_characters_and_titles_are_deleted_there(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    books = {}
    for name, lines in {
        "rows.xlsx": [["prompt", "completion"], ["a_x000D_\nb", "_x005F_x000D_"]],
        "title.xlsx": [["All of it"], ["prompt", "completion"], ["a", "b"]],
    }.items():
        book = openpyxl.Workbook()
        for line in lines:
            book.active.append(line)
        book.save(tmp_path / name)
        books[name] = (tmp_path / name).read_bytes()

    rows, _ = values("rows.xlsx", books["rows.xlsx"])

    assert rows == [{"prompt": "a\r\nb", "completion": "_x000D_"}]
    with pytest.raises(ConfigError, match="row 2 .* delete the rows above them in Excel"):
        values("title.xlsx", books["title.xlsx"])
