"""Home page: machine, ways to start, queue and runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.pages.components import changed_updates, markup, on_event, on_load, timer_options
from gradio_app.pages.layout import heading
from gradio_app.pages.run_state import percent_done, phase_text, state_badge, time_left
from gradio_app.pages.run_table import RunTable
from gradio_app.pages.templating import render
from gradio_app.recipe.edits import demo_recipe
from gradio_app.runs.formatting import format_bytes
from gradio_app.runs.machine import Machine, this_machine
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from lightning_peft.compat.gradio import event_data
from lightning_peft.demo.real_base import absence_of_smollm2

SECONDS = 2.0


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    below = "home.below_space" if studio.settings.space else "home.below"
    heading(t("home.heading"), t, t(below))
    machine, now = markup(elem_id="machine"), markup(elem_id="running-now")
    _cards(studio, t)
    line = markup(elem_id="line", js_on_load=CLICK_DELEGATE)
    table, seen = RunTable(studio, t), gr.Textbox(visible=False)
    outputs = [now, line, seen]

    def look(request: gr.Request, before: Any, *given: Any) -> list[Any]:
        owner = studio.owner(request)
        return [*_changed(studio, t, owner, before), *table.updates(owner, *given)]

    def first(request: gr.Request) -> list[Any]:
        lent = studio.settings.limits.minutes if studio.settings.zero_gpu else None
        owner, summary = studio.owner(request), machine_summary(this_machine(), t, lent)
        return [summary, *_changed(studio, t, owner, ""), *table.updates(owner)]

    def act(request: gr.Request, event: gr.EventData) -> list[Any]:
        owner = studio.owner(request)
        _act(studio, owner, event)
        return _changed(studio, t, owner, "")

    shown = [*outputs, *table.outputs]
    on_load(first, None, [machine, *shown])
    gr.Timer(SECONDS).tick(look, [seen, *table.inputs], shown, **timer_options())
    on_event(t, line.click, act, None, outputs)
    table.bind()


def _changed(studio: Studio, t: Texts, owner: str, before: Any) -> list[Any]:
    """Returns the updates that a browser does not have yet."""
    line = [(run if run.owner == owner else None) for run in studio.queue.order()]
    queue = render("home.queue", t, runs=line) if line else ""
    known, values = changed_updates((active_runs(studio.store.list(owner), t), queue), before)
    return [*values, known]


def _act(studio: Studio, owner: str, event: Any) -> None:
    """Does what a button of the queue requests."""
    data = event_data(event)
    act, run = data.get("act"), str(data.get("run"))
    if act in ("earlier", "later"):
        studio.queue.move(owner, run, -1 if act == "earlier" else 1)
    elif act == "leave":
        studio.queue.cancel(owner, run)


def _cards(studio: Studio, t: Texts) -> None:
    with gr.Row(elem_id="cards", equal_height=True):
        with gr.Column(elem_classes="card", min_width=260):
            absent = absence_of_smollm2()
            text = t("home.try_toy", fix=absent) if absent else t("home.try_text")
            markup(render("home.card", t, name="try", text=text, warns=bool(absent)))
            start = gr.Button(t("home.try_button"), variant="primary", elem_id="start-demo")
        slow = not this_machine().gpu
        qlora = t("home.big_slow" if slow else "home.big_text")
        for name, text, query in (("own", "", {}), ("big", qlora, {"method": "qlora"})):
            with gr.Column(elem_classes="card", min_width=260):
                link = t.url("new", **query)
                markup(render("home.card", t, name=name, text=text, link=link, warns=slow))
    to = gr.Textbox(visible=False)

    def begin(request: gr.Request) -> str:
        run = studio.start(studio.owner(request), demo_recipe(), t("home.try_name"))
        return t.url("run", run=run.id)

    go = "(url) => { if (url) window.location.href = url; }"
    on_event(t, start.click, begin, None, to).success(None, to, None, js=go)


def machine_summary(found: Machine, t: Texts, lent_minutes: float | None = None) -> str:
    """Returns in sentences what a machine can do, or a GPU that is lent to a run for minutes."""
    lora, qlora = found.max_billions(quantized=False), found.max_billions(quantized=True)
    if found.gpu and found.gpu_bytes:
        has = t("home.machine_gpu", gpu=found.gpu, memory=format_bytes(found.gpu_bytes, t))
        can = t("home.fits_gpu", lora=t.localized(f"{lora:g}"), qlora=t.localized(f"{qlora:g}"))
    elif found.gpu:
        has, can = t("home.machine_gpu_alone", gpu=found.gpu), t("home.fits_unknown")
    elif lent_minutes is not None:
        has, can = t("home.machine_lent", seconds=round(60 * lent_minutes)), ""
    else:
        has = t("home.machine_no_gpu")
        can = t("home.fits_cpu", lora=t.localized(f"{lora:g}")) if lora else t("home.fits_little")
    memory, free = format_bytes(found.memory_bytes, t), format_bytes(found.free_bytes, t)
    rest = t("home.machine_rest", cores=found.cores, memory=memory, free=free)
    return render("home.machine_summary", t, has=has, rest=rest, can=can)


def active_runs(runs: Sequence[Run], t: Texts) -> str:
    """Returns the runs that are at work."""
    rows = [_active_run(run, t) for run in runs if run.active]
    return render("home.active_runs", t, runs=rows) if rows else ""


def _active_run(run: Run, t: Texts) -> dict[str, Any]:
    done, facts = percent_done(run), phase_text(run, t)
    if done is not None:
        facts = ", ".join(filter(None, [t("run.percent", percent=done), time_left(run, t)]))
    return {"run": run, "badge": state_badge(run, t), "facts": facts, "percent": done or 0}
