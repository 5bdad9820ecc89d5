"""Editing and excluding rows, in a copy of the data file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.pages.components import field, on_event
from gradio_app.pages.new.data_check import data_path, keep_upload, recipes_in_use
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.recipe.content import MISSING, data_of, with_value
from gradio_app.recipe.row_edits import LONGEST_ROW, row_text, write_edited
from gradio_app.redaction import UPLOAD, short_name

_EDITED, _DATA = "-edited", "data.init_args.data"


def build(editor: Editor) -> None:
    """Makes the part."""
    t = editor.t
    with gr.Accordion(t("data.edit"), open=False, elem_id="edit-row-part"):
        with gr.Row(elem_classes="settings"):
            number = field(gr.Textbox, t, "data.edit_number", "edit-row-number", max_length=12)
            show = gr.Button(t("data.edit_show"), size="sm", elem_id="edit-row-show")
        text = field(
            gr.Textbox,
            t,
            "data.edit_text",
            "edit-row-text",
            lines=6,
            max_lines=16,
            max_length=LONGEST_ROW,
            elem_classes="code",
        )
        with gr.Row():
            save = gr.Button(t("data.edit_save"), size="sm", elem_id="edit-row-save")
            leave = gr.Button(t("data.edit_leave"), size="sm", elem_id="edit-row-leave")
        problem = editor.problem("edit-row-problem")
    # Of other data it would be wrong.
    editor.show([text], lambda session: [""])

    def shown(session: Any, number: Any, request: gr.Request) -> str:
        session = editor.of(session, request)
        return row_text(data_path(editor, session), _number(number))

    given = [editor.session, number]
    on_event(t, [show.click, number.submit], shown, given, text)

    def saved(session: Session, number: Any, text: Any) -> dict[str, Any]:
        return _edited(editor, session, _number(number), str(text or ""))

    def left_out(session: Session, number: Any) -> dict[str, Any]:
        return _edited(editor, session, _number(number), None)

    editor.bind(save.click, saved, [number, text], own=True, problem=problem)
    editor.bind(leave.click, left_out, [number], own=True, problem=problem)


def _number(given: Any) -> int:
    text = str(given or "").strip()
    if not text.isdecimal():
        raise UserError("checks.integer", value=text or "-")
    return int(text)


def _edited(editor: Editor, session: Session, number: int, text: str | None) -> dict[str, Any]:
    """Returns the recipe with a copy of its data in which a row is another one, or left out."""
    place, path = data_of(session.content), data_path(editor, session)
    stem = short_name(place).rpartition(".")[0].removesuffix(_EDITED)
    # The copy of the edit before, unless something else names it.
    others = with_value(session.content, _DATA, MISSING)
    name = session.edited_copy
    used = f"{others}\n{recipes_in_use(editor, session)}"
    replaced = path if name and place == UPLOAD + name and name not in used else None
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        copy = Path(folder) / f"{stem[:32]}{_EDITED}.jsonl"
        write_edited(path, number, text, copy)
        made = keep_upload(editor, session, copy, replaced)
    session.edited_copy = made.name
    return with_value(session.content, _DATA, f"{UPLOAD}{made.name}")
