"""The HTML of the first page: the machine, the cards, the runs and the queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gradio_app.pages.confirmation import confirm_button, confirmation
from gradio_app.pages.run_state import percent_done, phase_text, state_badge, time_left
from gradio_app.pages.templating import render
from gradio_app.runs.formatting import format_bytes, format_number, time_ago
from gradio_app.runs.machine import Machine
from gradio_app.runs.summaries import summary_of
from gradio_app.runs.types import Run
from gradio_app.texts import Texts

PER_PAGE = 10


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
    """Returns in sentences what a machine can do.

    Args:
        found: What it has of its own.
        t: Texts.
        lent_minutes: For how long a run may use a GPU that is lent to it, if one is.
    """
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


def card(name: str, t: Texts, link: str = "", gpu: str | None = None) -> str:
    """Returns one of the ways to begin.

    Args:
        name: Which one: ``"try"``, ``"own"`` or ``"big"``.
        t: Texts.
        link: Where it leads; the demo has a button of its own.
        gpu: Name of the machine's GPU, if it has one.
    """
    return render("home.card", t, name=name, link=link, gpu=gpu)


def active_runs(runs: Sequence[Run], t: Texts) -> str:
    """Returns the runs that are at work."""
    rows = [_active_run(run, t) for run in runs if run.active]
    return render("home.active_runs", t, runs=rows) if rows else ""


def _active_run(run: Run, t: Texts) -> dict[str, Any]:
    done = percent_done(run)
    facts = [phase_text(run, t)]
    if done is not None:
        facts = [t("run.percent", percent=done), *filter(None, [time_left(run, t)])]
    return {
        "badge": state_badge(run, t),
        "url": t.url("run", run=run.id),
        "name": run.name,
        "facts": ", ".join(facts),
        "state": run.status.state,
        "percent": done or 0,
    }


def run_lists(page: RunPage, line: Sequence[Run | None], t: Texts) -> str:
    """Returns the queue, and a page of the runs.

    Args:
        page: The page.
        line: The runs that wait; ``None`` for those of others.
        t: Texts.
    """
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
        "url": t.url("run", run=run.id),
        "name": run.name,
        "state": state_badge(run, t),
        "task": " ".join(filter(None, [found.task, found.method])),
        "loss": loss,
        "when": time_ago(run.created, t) if run.created else "",
        "delete": "" if run.active else _delete(run, t),
    }


def _delete(run: Run, t: Texts) -> Markup:
    label = t("home.delete_named", name=run.name)
    asked = t("run.sure_delete", name=run.name, size=format_bytes(run.bytes, t))
    yes = render("home.delete_button", t, id=run.id)
    button = confirm_button(run.id, t("home.delete"), label)
    return Markup(button + confirmation(run.id, asked, yes, t))
