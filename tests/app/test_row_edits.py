"""Rows that are changed or left out on the page: in a copy, and nothing else of the file."""

from __future__ import annotations

import json
from types import SimpleNamespace

import gradio as gr
import pytest

from gradio_app.errors import UserError
from gradio_app.pages.new import row_edit
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.recipe.content import with_value
from gradio_app.recipe.edits import base_recipe, with_data
from gradio_app.recipe.row_edits import row_text, write_edited
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.runs.store import RunStore
from gradio_app.texts import Texts
from gradio_app.uploads import MAX_FILES, Uploads
from tests.app.browsing import open_new_run, shown_recipe, upload_rows
from tests.app.runs import settings

MINUTES = 3 * 60_000
ROWS = [{"prompt": f"What is {n} \u00d7 {n}?", "completion": f"It is {n * n}."} for n in range(30)]


@pytest.fixture
def file(tmp_path):
    made = tmp_path / "rows.jsonl"
    made.write_bytes(b'{"b": 1,  "a": "\xc3\xa4"}\r\n\n[1]\n{"last": true}')
    return made


def test_one_row_is_another_and_the_others_stay_byte_for_byte(file, tmp_path):
    before, copy = file.read_bytes(), tmp_path / "copy.jsonl"
    assert json.loads(row_text(file, 1)) == {"b": 1, "a": "\u00e4"}
    write_edited(file, 4, '{\n "last": "\u00e4"\n}', copy)
    start = before.rpartition(b"\n")[0]
    assert copy.read_bytes() == start + b'\n{"last": "\xc3\xa4"}\n'
    # An empty line, so that row 4 is still row 4.
    write_edited(file, 1, None, copy)
    assert copy.read_bytes() == b"\n" + before.partition(b"\n")[2]
    assert json.loads(row_text(copy, 4)) == {"last": True}
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("number", "text", "key"),
    [
        (9, "{}", "data.edit_none"),
        (2, None, "data.edit_none"),
        (3, "{}", "data.edit_json"),
        (1, "[1]", "data.edit_json"),
        (1, "{", "data.edit_json"),
        (1, '{"a": "\\ud83d"}', "data.edit_json"),
        (1, '{"a": "\ud83d"}', "data.edit_json"),
    ],
)
def test_what_is_no_row_is_refused(file, tmp_path, number, text, key):
    with pytest.raises(UserError, match=key):
        write_edited(file, number, text, tmp_path / "copy.jsonl")
    with pytest.raises(UserError, match=r"data\.edit_kind"):
        write_edited(tmp_path / "rows.csv", 1, "{}", tmp_path / "copy.jsonl")


@pytest.fixture
def editor(tmp_path):
    studio = SimpleNamespace(settings=settings(tmp_path))
    studio.store = RunStore(studio.settings)
    with gr.Blocks():
        return Editor(studio, Texts())


def test_each_edit_is_of_the_copy_before_which_runs_keep(editor):
    studio = editor.studio
    data = studio.settings.data_root / "Sums.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    content = with_data(base_recipe("sft"), str(data))
    session = Session(content, content)
    uploads = Uploads(studio.settings, "local")
    session.content = row_edit._edited(editor, session, 2, None)
    session.content = row_edit._edited(editor, session, 3, '{"prompt": "2?", "completion": "4"}')
    (copy,) = uploads.list()
    assert copy.title == "sums-edited.jsonl"
    lines = copy.path.read_text().splitlines()
    assert (lines[0], lines[1]) == (json.dumps(ROWS[0]), "")
    assert json.loads(lines[2])["completion"] == "4"
    # All but the data stays, and so does a copy that a run was started with.
    assert {**session.content, "data": None} == {**content, "data": None}
    studio.store.create("local", dump_yaml(session.content), "a run")
    session.content = row_edit._edited(editor, session, 1, None)
    assert len(uploads.list()) == 2
    assert data.read_text().splitlines()[1] == json.dumps(ROWS[1])


def test_only_the_copy_of_an_edit_makes_room_for_the_next(editor, tmp_path):
    own = tmp_path / "sums-edited.jsonl"
    own.write_text("\n".join(map(json.dumps, ROWS)))
    uploads = Uploads(editor.studio.settings, "local")
    names = [uploads.save(own, "20261130").name for _ in range(MAX_FILES)]
    content = with_data(base_recipe("sft"), f"upload:{names[-1]}")
    session = Session(content, base_recipe("sft"))
    session.content = row_edit._edited(editor, session, 2, None)
    # The oldest had to go, and not the one that was edited.
    assert "deleted: sums-edited.jsonl" in session.notice
    left = {one.name for one in uploads.list()}
    assert len(left & set(names)) == MAX_FILES - 1
    assert names[-1] in left
    session.content = row_edit._edited(editor, session, 3, None)
    assert {one.name for one in uploads.list()} & set(names) == left & set(names)
    # A copy that is also the held-out rows, or what settings are reset to, stays.
    first = session.edited_copy
    path = "data.init_args.validation_data"
    session.content = with_value(session.content, path, f"upload:{first}")
    uploads.get(names[-1]).path.unlink()
    session.content = row_edit._edited(editor, session, 4, None)
    assert uploads.get(first)


@pytest.mark.long
def test_a_row_is_edited_and_another_left_out(visit, site):
    page = open_new_run(visit, site, "#data")
    upload_rows(page, "sums.jsonl", ROWS)
    report = page.locator("#data-report")
    report.get_by_text("All 30 rows are usable").wait_for(timeout=MINUTES)
    page.locator("#edit-row-part > button").click()
    number = page.locator("#edit-row-number :is(input, textarea)")
    number.fill("31")
    page.get_by_role("button", name="Leave row out").click()
    page.locator("#edit-row-problem").get_by_text("There is no row 31").wait_for()
    number.fill("3")
    page.get_by_role("button", name="Show row").click()
    text = page.locator("#edit-row-text textarea")
    page.wait_for_function("document.querySelector('#edit-row-text textarea').value.includes('4')")
    text.fill(text.input_value().replace("It is 4.", "Four."))
    page.get_by_role("button", name="Save change").click()
    page.locator("#data-facts").get_by_text("sums-edited.jsonl").wait_for()
    report.get_by_text("All 30 rows are usable").wait_for(timeout=MINUTES)
    number.fill("2")
    page.get_by_role("button", name="Leave row out").click()
    report.get_by_text("All 29 rows are usable").wait_for(timeout=MINUTES)
    # One copy, with both changes.
    (copy,) = (site.runs / "uploads").glob("*/*-sums-edited.jsonl")
    rows = [json.loads(line) if line.strip() else None for line in copy.open(encoding="utf-8")]
    changed = {**ROWS[2], "completion": "Four."}
    assert rows == [ROWS[0], None, changed, *ROWS[3:]]
    assert shown_recipe(page)["data"]["init_args"]["data"].endswith(copy.name)
