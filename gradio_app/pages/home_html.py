"""The HTML of the first page: the machine, the cards, the runs and the line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradio_app.guards import escaped
from gradio_app.pages.confirmation import confirm_button, confirmation
from gradio_app.pages.run_state import (
    escaped_name,
    percent_done,
    phase_text,
    state_badge,
    time_left,
)
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
    return (
        f'<p class="machine"><strong>{t("home.machine")}:</strong> '
        f"{escaped(has)} {escaped(rest)} {escaped(can)}</p>"
    )


def card(name: str, t: Texts, link: str = "", gpu: str | None = None) -> str:
    """Returns one of the ways to begin.

    Args:
        name: Which one: ``"try"``, ``"own"`` or ``"big"``.
        t: Texts.
        link: Where it leads; the demo has a button of its own.
        gpu: Name of the machine's GPU, if it has one.
    """
    text = f"<h2>{t(f'home.{name}_title')}</h2><p>{t(f'home.{name}_text')}</p>"
    if name == "big" and not gpu:
        text += f'<p class="why-not">{t("home.big_why_not")}</p>'
    if link:
        text += f'<a class="as-button" href="{escaped(link)}">{t(f"home.{name}_button")}</a>'
    return f'<div class="way">{text}</div>'


def active_runs(runs: Sequence[Run], t: Texts) -> str:
    """Returns the runs that are at work."""
    items = "".join(_active_item(run, t) for run in runs if run.active)
    return f'<section aria-label="{t("home.running_now")}">{items}</section>' if items else ""


def _active_item(run: Run, t: Texts) -> str:
    done = percent_done(run)
    facts = [phase_text(run, t)]
    if done is not None:
        facts = [t("run.percent", percent=done), *filter(None, [time_left(run, t)])]
    return (
        f'<div class="at-work">{state_badge(run, t)} '
        f'<a href="{_url(run, t)}">{escaped_name(run)}</a>'
        f'<span>{escaped(", ".join(facts))}</span><div class="bar {run.status.state}" '
        f'aria-hidden="true"><span style="width: {done or 0}%"></span></div></div>'
    )


def run_lists(page: RunPage, line: Sequence[Run | None], t: Texts) -> str:
    """Returns the line, and a page of the runs.

    Args:
        page: The page.
        line: The runs that wait; ``None`` for those of others.
        t: Texts.
    """
    return _queue(line, t) + _runs(page, bool(line), t)


def _queue(line: Sequence[Run | None], t: Texts) -> str:
    if not line:
        return ""
    own = [run.id for run in line if run is not None]
    items = "".join(_queued_run(run, own, t) for run in line)
    return (
        f"<section><h2>{t('home.line')}</h2><p>{t('home.line_note')}</p>"
        f'<ol class="line">{items}</ol></section>'
    )


def _queued_run(run: Run | None, own: Sequence[str], t: Texts) -> str:
    if run is None:
        return f"<li><span>{t('home.someone')}</span></li>"
    place = own.index(run.id)
    ends = {"earlier": place == 0, "later": place == len(own) - 1, "leave": False}
    buttons = "".join(_button(act, run, t, off) for act, off in ends.items())
    name = f'<a href="{_url(run, t)}">{escaped_name(run)}</a>'
    return f'<li>{name}<span class="does">{buttons}</span></li>'


def _runs(page: RunPage, waiting: bool, t: Texts) -> str:
    title = f"<h2>{t('home.runs')}</h2>"
    if not page.runs:
        if waiting:
            return ""
        return (
            f'<section>{title}<div class="empty"><strong>{t("home.no_runs")}</strong>'
            f"<p>{t('home.no_runs_more')}</p></div></section>"
        )
    names = ("name", "state", "task", "loss", "when", "what_to_do")
    head = "".join(f'<th scope="col">{t(f"home.{name}")}</th>' for name in names)
    rows = "".join(_row(run, t) for run in page.runs)
    return (
        f'<section>{title}<table class="runs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>{_pages(page, t)}</section>"
    )


def _row(run: Run, t: Texts) -> str:
    found = summary_of(run)
    loss = ""
    if found.loss is not None:
        kind = "validation" if found.validated else "training"
        loss = t(f"home.loss_{kind}", value=format_number(found.loss, t))
    task = " ".join(filter(None, [found.task, found.method]))
    moment = time_ago(run.created, t) if run.created else ""
    cells = {"state": state_badge(run, t), "task": escaped(task), "loss": loss, "when": moment}
    middle = "".join(
        f'<td data-label="{t(f"home.{name}")}">{cell}</td>' for name, cell in cells.items()
    )
    return (
        f'<tr><th scope="row"><a href="{_url(run, t)}">{escaped_name(run)}</a></th>{middle}'
        f'<td class="does">{"" if run.active else _delete(run, t)}</td></tr>'
    )


def _delete(run: Run, t: Texts) -> str:
    label = t("home.delete_named", name=run.name)
    asked = t("run.sure_delete", name=run.name, size=format_bytes(run.bytes, t))
    yes = (
        f'<button type="button" class="as-button danger" data-act="delete" data-run="{run.id}">'
        f"{t('run.yes_delete')}</button>"
    )
    return confirm_button(run.id, t("home.delete"), label) + confirmation(run.id, asked, yes, t)


def _pages(page: RunPage, t: Texts) -> str:
    if page.pages == 1:
        return ""
    ways = (("newer", page.number - 1), ("older", page.number + 1))
    newer, older = (
        f'<button type="button" class="as-button" data-act="page" data-run="{to}"'
        f"{'' if 1 <= to <= page.pages else ' disabled'}>{t(f'home.{name}')}</button>"
        for name, to in ways
    )
    said = t("home.page_of", page=page.number, pages=page.pages)
    return f'<div class="pages">{newer}<span>{said}</span>{older}</div>'


def _button(act: str, run: Run, t: Texts, off: bool = False) -> str:
    label = escaped(t(f"home.{act}_named", name=run.name))
    return (
        f'<button type="button" class="as-button" data-act="{act}" data-run="{run.id}" '
        f'aria-label="{label}"{" disabled" if off else ""}>{t(f"home.{act}")}</button>'
    )


def _url(run: Run, t: Texts) -> str:
    return escaped(t.url("run", run=run.id))
