"""The first page: what this machine can do, three ways to begin, the queue and the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.pages.components import (
    changed_updates,
    markup,
    on_event,
    on_load,
    timer_options,
)
from gradio_app.pages.layout import heading
from gradio_app.pages.run_state import percent_done, phase_text, state_badge, time_left
from gradio_app.pages.templating import render
from gradio_app.recipe.edits import demo_recipe
from gradio_app.runs.formatting import format_bytes, format_number, time_ago
from gradio_app.runs.machine import Machine, this_machine
from gradio_app.runs.summaries import summary_of
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from lightning_peft.compat.gradio import event_data
from lightning_peft.demo.real_base import absence_of_smollm2

SECONDS = 2.0
PER_PAGE = 10


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    below = "home.below_space" if studio.settings.space else "home.below"
    heading(t("home.heading"), t, t(below))
    machine, now = markup(elem_id="machine"), markup(elem_id="running-now")
    _cards(studio, t)
    lists = markup(elem_id="runs", js_on_load=CLICK_DELEGATE)
    page, seen = gr.State(1), gr.Textbox(visible=False)
    outputs = [now, lists, page, seen]

    def look(number: Any, before: Any, request: gr.Request) -> list[Any]:
        return _changed(studio, t, studio.owner(request), number, before)

    def first(request: gr.Request) -> list[Any]:
        lent = studio.settings.limits.minutes if studio.settings.zero_gpu else None
        return [machine_summary(this_machine(), t, lent), *look(1, "", request)]

    def act(number: Any, request: gr.Request, event: gr.EventData) -> list[Any]:
        owner = studio.owner(request)
        number = _act(studio, owner, number, event)
        return _changed(studio, t, owner, number, "")

    on_load(first, None, [machine, *outputs])
    gr.Timer(SECONDS).tick(look, [page, seen], outputs, **timer_options())
    on_event(t, lists.click, act, page, outputs)


def _changed(studio: Studio, t: Texts, owner: str, number: Any, before: Any) -> list[Any]:
    """Returns the updates that a browser does not have yet."""
    runs = studio.store.list(owner)
    page = RunPage.of(runs, number if isinstance(number, int) else 1)
    line = [(run if run.owner == owner else None) for run in studio.queue.order()]
    shown = (active_runs(runs, t), run_lists(page, line, t))
    known, values = changed_updates(shown, before)
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
            absent = absence_of_smollm2()
            text = t("home.try_toy", fix=absent) if absent else t("home.try_text")
            markup(render("home.card", t, name="try", text=text))
            start = gr.Button(t("home.try_button"), variant="primary", elem_id="start-demo")
        for name, query in (("own", {}), ("big", {"method": "qlora"})):
            with gr.Column(elem_classes="card", min_width=260):
                link, gpu = t.url("new", **query), this_machine().gpu
                markup(render("home.card", t, name=name, link=link, gpu=gpu))
    to = gr.Textbox(visible=False)

    def begin(request: gr.Request) -> str:
        run = studio.start(studio.owner(request), demo_recipe(), t("home.try_name"))
        return t.url("run", run=run.id)

    go = "(url) => { if (url) window.location.href = url; }"
    on_event(t, start.click, begin, None, to).success(None, to, None, js=go)


@dataclass(frozen=True)
class RunPage:
    """One page of the list of runs.

    Attributes:
        runs: The runs on it.
        number: Which page it is, from 1.
        pages: How many there are.
    """

    runs: Sequence[Run]
    number: int
    pages: int

    @classmethod
    def of(cls, runs: Sequence[Run], wanted: int) -> RunPage:
        """Returns a page of the runs that do not wait, the nearest to the one that is wanted."""
        resting = [run for run in runs if not run.waiting]
        pages = max(1, -(-len(resting) // PER_PAGE))
        page = min(max(wanted, 1), pages)
        return cls(resting[(page - 1) * PER_PAGE : page * PER_PAGE], page, pages)


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


def run_lists(page: RunPage, line: Sequence[Run | None], t: Texts) -> str:
    """Returns the queue, in which ``None`` is a run of somebody else, and a page of the runs."""
    queue = render("home.queue", t, runs=line) if line else ""
    if not page.runs and line:
        return queue
    rows = [_row(run, t) for run in page.runs]
    return queue + render("home.run_table", t, rows=rows, page=page)


def _row(run: Run, t: Texts) -> dict[str, Any]:
    found = summary_of(run)
    loss = ""
    if found.loss is not None:
        kind = "validation" if found.validated else "training"
        loss = t(f"home.loss_{kind}", value=format_number(found.loss, t))
    return {
        "run": run,
        "state": state_badge(run, t),
        "task": " ".join(filter(None, [found.task, found.method])),
        "loss": loss,
        "when": time_ago(run.created, t) if run.created else "",
    }
