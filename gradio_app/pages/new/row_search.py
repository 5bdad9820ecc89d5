"""Text search in rows, shown as the model is trained on them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.pages.components import field, html, on_event
from gradio_app.pages.new import data_html
from gradio_app.pages.new.editor import Editor
from gradio_app.recipe.content import data_of
from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.preview import search_rows
from gradio_app.recipe.validation import validate_content, with_revision

MAX_CHARACTERS = 200


def build(editor: Editor) -> None:
    """Makes the part."""
    t = editor.t
    with gr.Accordion(t("data.search"), open=False, elem_id="search-rows"):
        text = field(
            gr.Textbox, t, "data.search_text", "search-text", max_length=MAX_CHARACTERS, max_lines=1
        )
        search = gr.Button(t("data.search_button"), size="sm", elem_id="search-button")
        found = html(elem_id="found-rows")
    # Of other data they would be wrong.
    editor.show([found], lambda session: [""])

    def searched(session: Any, text: Any, request: gr.Request) -> str:
        session = editor.of(session, request)
        if not isinstance(text, str) or not text.strip() or len(text) > MAX_CHARACTERS:
            raise UserError("checks.search", most=MAX_CHARACTERS)
        if not data_of(session.content):
            raise UserError("checks.no_rows")
        settings, data = editor.studio.settings, with_revision(session.content)["data"]
        # Whatever the model is, the rows are the same.
        content = validate_content({**base_recipe("sft"), "data": data}, settings, session.owner)
        report = search_rows(content, editor.studio.worker, settings.space, text.strip())
        # Other data was chosen meanwhile.
        current = with_revision(session.content).get("data") == data
        return data_html.found_rows(report, t) if current else ""

    on_event(t, [search.click, text.submit], searched, [editor.session, text], found)
