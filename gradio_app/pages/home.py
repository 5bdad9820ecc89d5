"""The first page: what this machine can do, three ways to begin, and the runs so far."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.errors import UserError
from gradio_app.pages import home_html
from gradio_app.pages.error_reporting import report_errors
from gradio_app.pages.layout import event_options, heading, on_load, timer_options
from gradio_app.pages.markup import markup
from gradio_app.pages.updates import changed_updates
from gradio_app.recipe.edits import demo_recipe
from gradio_app.runs.machine import this_machine
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import owner_of
from lightning_peft.compat.gradio import event_data

SECONDS = 2.0


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    below = "home.below_space" if studio.settings.space else "home.below"
    heading(t("home.heading"), t(below))
    machine = markup("", elem_id="machine")
    now = markup("", elem_id="running-now")
    _cards(studio, t)
    lists = markup("", elem_id="runs", js_on_load=CLICK_DELEGATE)
    page, seen = gr.State(1), gr.Textbox(visible=False)
    outputs = [now, lists, page, seen]

    def look(number: Any, before: Any, request: gr.Request) -> list[Any]:
        owner = owner_of(request, studio.settings.space)
        return _changed(studio, t, owner, number, before)

    def first(request: gr.Request) -> list[Any]:
        lent = studio.settings.limits.minutes if studio.settings.zero_gpu else None
        return [home_html.machine_summary(this_machine(), t, lent), *look(1, "", request)]

    @report_errors(t)
    def act(number: Any, request: gr.Request, event: gr.EventData) -> list[Any]:
        owner = owner_of(request, studio.settings.space)
        number = _act(studio, owner, number, event)
        return _changed(studio, t, owner, number, "")

    on_load(first, None, [machine, *outputs])
    gr.Timer(SECONDS).tick(look, [page, seen], outputs, **timer_options())
    lists.click(act, page, outputs, **event_options())


def _changed(studio: Studio, t: Texts, owner: str, number: Any, before: Any) -> list[Any]:
    """Returns the updates that a browser does not have yet."""
    runs = studio.store.list(owner)
    page = home_html.RunPage.of(runs, number if isinstance(number, int) else 1)
    line = [(run if run.owner == owner else None) for run in studio.queue.order()]
    shown = (home_html.active_runs(runs, t), home_html.run_lists(page, line, t))
    known, values = changed_updates([(text, text) for text in shown], before)
    return [*values, page.number, known]


def _act(studio: Studio, owner: str, number: Any, event: Any) -> Any:
    """Does what a button of a list asks for, and returns the page to show."""
    data = event_data(event)
    act, run = data.get("act"), str(data.get("run"))
    if act == "page":
        return int(run) if run.isdecimal() and len(run) < 6 else 1
    if act == "delete":
        studio.store.delete(owner, run)
    elif act in ("earlier", "later"):
        studio.queue.move(owner, run, -1 if act == "earlier" else 1)
    elif act == "leave":
        studio.queue.cancel(owner, run)
    return number


def _cards(studio: Studio, t: Texts) -> None:
    with gr.Row(elem_id="cards", equal_height=True):
        with gr.Column(elem_classes="card", min_width=260):
            markup(home_html.card("try", t))
            start = gr.Button(t("home.try_button"), variant="primary", elem_id="start-demo")
        for name, query in (("own", {}), ("big", {"method": "qlora"})):
            with gr.Column(elem_classes="card", min_width=260):
                link = t.url("new", **query)
                markup(home_html.card(name, t, link, this_machine().gpu))
    to = gr.Textbox(visible=False)

    @report_errors(t)
    def begin(request: gr.Request) -> str:
        owner = owner_of(request, studio.settings.space)
        run = studio.store.create(owner, demo_recipe(), t("home.try_name"))
        try:
            studio.queue.add(run)
        except UserError:
            studio.store.delete(owner, run.id)
            raise
        return t.url("run", run=run.id)

    go = "(url) => { if (url) window.location.href = url; }"
    start.click(begin, None, to, **event_options()).success(None, to, None, js=go)
