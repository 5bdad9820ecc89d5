"""Validation and test rows from separate files."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from gradio_app.pages.components import field
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.recipe.content import MISSING, value_at, with_value
from gradio_app.redaction import UPLOAD

SPLITS = ("validation", "test")
_DATA = "data.init_args."


def build(editor: Editor) -> None:
    """Makes the part."""
    t = editor.t
    with (
        gr.Accordion(t("data.held_out"), open=False, elem_id="held-out"),
        gr.Row(elem_classes="settings"),
    ):
        parts = [
            field(gr.Dropdown, t, f"data.{split}_file", f"{split}-file", choices=[], value=None)
            for split in SPLITS
        ]
    problem = editor.problem("held-out-problem")
    for split, part in zip(SPLITS, parts, strict=True):
        change = partial(_change, editor, split)
        editor.bind(part.input, change, [part], own=True, problem=problem)
    editor.show(parts, lambda session: _updates(editor, session))


def _change(editor: Editor, split: str, session: Session, given: Any) -> dict[str, Any]:
    if not given:
        return with_value(session.content, f"{_DATA}{split}_data", MISSING)
    place = editor.places(session).data(given)
    # Uploads keep their names here: their folder is the server's.
    named = str(given) if str(given).startswith(UPLOAD) else place
    content = with_value(session.content, f"{_DATA}{split}_data", named)
    # A share of the other file would be a second answer to the same question.
    return with_value(content, f"{_DATA}{split}_share", MISSING)


def _updates(editor: Editor, session: Session) -> list[Any]:
    """Returns the files to choose from: uploads, and those below the data root."""
    t, files = editor.t, editor.data_choices(session)
    known = [value for _, value in files]
    updates = []
    for split in SPLITS:
        place = str(value_at(session.content, f"{_DATA}{split}_data", None) or "")
        place = editor.listed_name(session, place)
        # One that a recipe names, such as a data set on the hub, stays.
        more = [(place, place)] if place and place not in known else []
        choices = [(t(f"data.{split}_none"), ""), *files, *more]
        help_text = editor.files_hint(session, t(f"data.{split}_file_hint"))
        updates.append(gr.update(choices=choices, value=place, **help_text))
    return updates
