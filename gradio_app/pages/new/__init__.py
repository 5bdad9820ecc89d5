"""New run: a short form for the common case, and four steps for everything else."""

from __future__ import annotations

import gradio as gr

from gradio_app.assets import script
from gradio_app.pages.components import html
from gradio_app.pages.layout import heading
from gradio_app.pages.new import data, method, model, review, starting_point
from gradio_app.pages.new.editor import Editor
from gradio_app.pages.templating import render
from gradio_app.studio import Studio
from gradio_app.texts import Texts

STEPS = ("model", "data", "method", "review")
# The step that is shown is in the address: links, the back button and reloads work by themselves.
_STEPPING = script("steps.js")


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    heading(t("new.heading"), t)
    html(render("new.steps", t, names=STEPS), elem_id="steps")
    editor = Editor(studio, t)
    of = html(elem_id="new-copied")
    editor.show([of], lambda session: [starting_point.copied_from(session, t)])
    makers = {"model": _model, "data": data.build, "method": method.build, "review": review.build}
    for (step, make), following in zip(makers.items(), (*STEPS[1:], ""), strict=True):
        with gr.Column(elem_id=f"step-{step}", elem_classes="step"):
            html(render("new.step_heading", t, name=step))
            make(editor)
            if following:
                html(render("new.next_step", t, name=following))
    editor.finish()
    starting_point.bind_page_load(editor)
    gr.on(None, None, None, None, js=_STEPPING)


def _model(editor: Editor) -> None:
    starting_point.build(editor)
    model.build(editor)
