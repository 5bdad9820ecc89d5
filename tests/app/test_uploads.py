"""Uploads: only data, only what their names say, each owner's apart, under names of the page's."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import gradio as gr
import pytest

from gradio_app.errors import UserError
from gradio_app.pages.new.data import _keep_upload
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.recipe import table
from gradio_app.recipe.content import data_of
from gradio_app.recipe.edits import base_recipe, with_data
from gradio_app.recipe.table import first_rows
from gradio_app.settings import Limits, Settings
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.uploads import MAX_FILES, Uploads
from tests.app.runs import settings as run_settings

DAY = "20261126"
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(uploads=tmp_path / "uploads", limits=Limits(upload_bytes=200_000))


@pytest.fixture
def uploads(settings) -> Uploads:
    return Uploads(settings, "local")


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet(folder: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    table = pytest.importorskip("pyarrow.parquet")
    table.write_table(arrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder / "rows.parquet"


LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("bad-rows.jsonl", f"{LINES}\nno json\n"),
        ("rows.json", json.dumps(ROWS)),
        ("rows.csv", "prompt,completion\na,b\nc,\n"),
        ("rows.tsv", "prompt\tcompletion\na\tb\nc\t\n"),
        ("UPPER.JSONL", LINES),
        ("with bom.jsonl", "\ufeff" + LINES),
        ("semicolons.csv", "prompt;completion\na;b\nc;\n"),
        ("utf-16.csv", "prompt;completion\na;b\nc;\n".encode("utf-16")),
    ],
)
def test_data_is_kept_and_its_first_rows_are_shown(name, content, uploads, tmp_path):
    upload = uploads.save(written(tmp_path, name, content), DAY)
    assert upload.path.parent == uploads.folder
    assert upload.path.read_bytes() == (tmp_path / name).read_bytes()
    table = first_rows(upload.path)
    assert table.columns == ["prompt", "completion"]
    assert table.rows == [["a", "b"], ["c", ""]]
    assert uploads.get(upload.name) == upload
    assert uploads.list() == [upload]


def test_text_of_windows_is_kept_and_shown_as_it_is_meant(uploads, tmp_path):
    rows = "prompt;completion\n" + "Wie heißt er?;Müller, natürlich\n" * 3
    upload = uploads.save(written(tmp_path, "excel.csv", rows.encode("cp1252")), DAY)
    assert first_rows(upload.path).rows == [["Wie heißt er?", "Müller, natürlich"]] * 3
    content = {"data": {"init_args": {"encoding": "cp1251", "delimiter": ";"}}}
    assert first_rows(upload.path, content).rows[0][0] != "Wie heißt er?"


def test_a_workbook_is_kept_and_shown_unless_it_unpacks_to_too_much(uploads, tmp_path):
    book = pytest.importorskip("openpyxl").Workbook()
    for row in (["prompt", "completion"], ["a", "b"], ["c", "d"]):
        book.active.append(row)
    book.save(tmp_path / "rows.xlsx")
    upload = uploads.save(tmp_path / "rows.xlsx", DAY)
    assert first_rows(upload.path).rows == [["a", "b"], ["c", "d"]]
    with zipfile.ZipFile(tmp_path / "many.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", "")
        for number in range(2001):
            archive.writestr(f"xl/{number}", "")
    with pytest.raises(UserError, match=r"checks\.upload_book"):
        uploads.save(tmp_path / "many.xlsx", DAY)


@pytest.mark.parametrize("head", [b"MZ\x90\0", b"PK\x03\x04", b"\x7fELF"])
def test_what_only_ends_as_parquet_is_refused(head, uploads, tmp_path):
    path = parquet(tmp_path)
    path.write_bytes(head + path.read_bytes()[len(head) :])
    with pytest.raises(UserError, match=r"checks\.upload_binary"):
        uploads.save(path, DAY)


def test_parquet_is_kept_and_shown(uploads, tmp_path):
    upload = uploads.save(parquet(tmp_path), DAY)
    assert first_rows(upload.path).rows == [["a", "b"], ["c", ""]]


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("rows.pkl", pickle.dumps(ROWS), "checks.upload_kind"),
        ("rows.jsonl", pickle.dumps(ROWS), "checks.upload_binary"),
        ("rows.csv", pickle.dumps(ROWS, protocol=5), "checks.upload_binary"),
        ("rows.parquet", pickle.dumps(ROWS), "checks.upload_binary"),
        ("rows.parquet", b"PAR1" + b"x" * 100, "checks.upload_binary"),
        ("rows.zip", b"PK\x03\x04", "checks.upload_kind"),
        ("rows.csv", b"PK\x03\x04abc", "checks.upload_binary"),
        ("rows.txt", b"\x7fELF", "checks.upload_binary"),
        ("rows.txt", bytes(range(256)), "checks.upload_binary"),
        ("rows.xlsx", b"PK\x03\x04abc", "checks.upload_binary"),
        ("rows.xlsx", LINES, "checks.upload_binary"),
        ("rows.jsonl", "<html>", "checks.upload_jsonl"),
        ("rows.jsonl", "[1]\n2\n", "checks.upload_jsonl"),
        ("rows.json", "x", "checks.upload_json"),
        ("rows.jsonl", "", "checks.upload_empty"),
        ("rows.jsonl", "{}" * 200_000, "checks.upload_size"),
        ("rows.html", "<script>", "checks.upload_kind"),
        ("rows.jsonl.py", "print(1)", "checks.upload_kind"),
    ],
)
def test_everything_else_is_refused(name, content, key, uploads, tmp_path):
    with pytest.raises(UserError) as caught:
        uploads.save(written(tmp_path, name, content), DAY)
    assert caught.value.key == key
    assert uploads.list() == []


def test_archives_and_links_are_not_opened(uploads, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.jsonl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", b"0" * 1_000_000)
    with pytest.raises(UserError, match=r"checks\.upload_binary"):
        uploads.save(tmp_path / "bomb.jsonl", DAY)
    (tmp_path / "link.jsonl").symlink_to("/etc/passwd")
    for path in (tmp_path / "link.jsonl", tmp_path / "no-such.jsonl", tmp_path):
        with pytest.raises(UserError):
            uploads.save(path, DAY)


@pytest.mark.parametrize(
    "name", ["..jsonl", "../../x.jsonl", "a b;rm -rf.jsonl", "\u00fcmlaut \u2013.jsonl", "-x.jsonl"]
)
def test_names_here_are_the_pages_own(name, uploads, tmp_path):
    path = written(tmp_path / "gradio" / "deep", name, LINES)
    if path.suffix != ".jsonl":
        return
    upload = uploads.save(path, DAY)
    assert upload.path.parent == uploads.folder
    assert all(c.isalnum() and c.isascii() or c in "-." for c in upload.name)
    assert upload.name.startswith(DAY)


@pytest.mark.parametrize(
    "name", ["../local/x", "/etc/passwd", "", None, ["a"], "20261126-00000000-x.jsonl", "a\0b"]
)
def test_only_own_files_are_given_out(name, uploads, settings, tmp_path):
    mine = uploads.save(written(tmp_path, "rows.jsonl", LINES), DAY)
    with pytest.raises(UserError, match=r"checks\.no_upload"):
        uploads.get(name)
    other = Uploads(settings, "v-other")
    assert other.list() == []
    with pytest.raises(UserError, match=r"checks\.no_upload"):
        other.get(mine.name)
    with pytest.raises(ValueError, match="not an owner"):
        Uploads(settings, "../local")
    assert uploads.list() == [mine]


def test_an_owner_cannot_fill_the_disk_with_many_files(uploads, settings, tmp_path):
    path = written(tmp_path, "rows.jsonl", LINES)
    for _ in range(MAX_FILES):
        uploads.save(path, DAY)
    with pytest.raises(UserError, match=r"checks\.upload_many"):
        uploads.save(path, DAY)
    names = [one.name for one in uploads.list()]
    with pytest.raises(UserError, match=r"checks\.upload_many"):
        uploads.drop_oldest(" ".join(names))
    larger = dataclasses.replace(settings, limits=Limits(upload_bytes=1))
    with pytest.raises(UserError, match=r"checks\.upload_size"):
        Uploads(larger, "v-2").save(path, DAY)


def test_a_folder_that_is_removed_in_between_is_made_again(uploads, tmp_path, monkeypatch):
    path, copyfile, removed = written(tmp_path, "rows.jsonl", LINES), shutil.copyfile, []

    def remove_and_copy(*paths):
        if not removed:
            removed.append(uploads.folder.rmdir())
        return copyfile(*paths)

    monkeypatch.setattr(shutil, "copyfile", remove_and_copy)
    assert uploads.save(path, DAY).path.read_text() == LINES
    assert removed


def test_the_oldest_upload_that_no_run_or_recipe_names_makes_room(tmp_path):
    studio = Studio(run_settings(tmp_path))
    try:
        uploads, path = Uploads(studio.settings, "local"), written(tmp_path, "rows.jsonl", LINES)
        old = [uploads.save(path, DAY) for _ in range(MAX_FILES)]
        for age, one in enumerate(old):
            os.utime(one.path, (age, age))
        studio.store.create("local", f"data: {{init_args: {{data: {old[0].path}}}}}\n", "run")
        content = with_data(base_recipe("sft"), f"upload:{old[1].name}")
        session = Session(content, content)
        with gr.Blocks():
            content = _keep_upload(Editor(studio, Texts()), session, path)
        left = [one.name for one in uploads.list()]
        assert set(left) == {one.name for one in old} - {old[2].name} | {left[0]}
        assert data_of(content) == f"upload:{left[0]}"
        assert "rows.jsonl" in session.notice
        # A recipe that cannot be read may name each of them.
        studio.store.list("local")[0].folder.recipe.write_text("")
        with pytest.raises(UserError, match=r"checks\.upload_many"):
            _keep_upload(Editor(studio, Texts()), session, path)
    finally:
        studio.close()


LONG = "x" * 50


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", "\n".join([json.dumps({"a": LONG})] * 100), [[LONG]] * 6),
        ("a.jsonl", json.dumps([{"a": LONG}] * 100, indent=1), []),
        ("a.jsonl", json.dumps({"a": LONG * 100}), None),
        ("a.json", json.dumps([{"a": LONG}] * 100), None),
        ("a.json.gz", gzip.compress(json.dumps([{"a": LONG}] * 100).encode(), mtime=0), None),
        ("b.json.gz", gzip.compress(json.dumps([{"a": "b"}] * 10).encode(), mtime=0), [["b"]] * 10),
        ("a.txt", f"{LONG}\n" * 100, [["\n".join([LONG] * 3) + "\n" + LONG[:46] + "\u2026"]]),
        ("a.csv", "a,b\n" + f'1,"{LONG}\n{LONG}"\n' * 100, [["1", f"{LONG}\n{LONG}"]] * 3),
    ],
)
def test_of_large_files_the_start_alone_is_read_for_the_first_rows(
    name, content, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(table, "_DOCUMENT_BYTES", 1_000)
    monkeypatch.setattr(table, "_HEAD_BYTES", 400)
    given = {"data": {"init_args": {"text_unit": "document"}}}
    found = first_rows(written(tmp_path, name, content), given)
    assert rows == (found.rows if found else None)


def test_rows_that_hold_much_are_shown_short(tmp_path):
    long = json.dumps({"text": "x" * 10_000, "n": {"deep": [1]}, "none": None})
    table = first_rows(written(tmp_path, "a.jsonl", "\n".join([long] * 100)))
    assert len(table.rows) == 20
    assert len(table.rows[0][0]) == 200
    assert table.rows[0][1:] == ['{"deep": [1]}', ""]
    assert first_rows(tmp_path / "no.jsonl") is None
    assert first_rows(written(tmp_path, "a.pkl", b"x")) is None
    assert first_rows(tmp_path).columns == ["text", "n", "none"]
