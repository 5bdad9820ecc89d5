"""What stands around every page: its head with the links and the run that is going on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import gradio as gr

from gradio_app.guards import escaped
from gradio_app.pages.run_state import STATE_ICONS, percent_done, phase_text, time_left
from gradio_app.settings import is_space
from gradio_app.studio import Studio
from gradio_app.texts import LANGUAGES, Texts
from gradio_app.visitors import owner_of
from lightning_peft.compat.gradio import root_block

# How often the head asks whether a run is going on. Nothing is sent where nothing has changed.
HEADER_SECONDS = 5.0
LINKS = ("", "new", "compare", "help")


@dataclass(frozen=True)
class Page:
    """One page of the site.

    Attributes:
        name: As in its address: ``""``, ``"new"``, ``"run"``, ``"compare"`` or ``"help"``.
        build: Makes its components, within the open Blocks, and binds its handlers.
    """

    name: str
    build: Callable[[Studio, Texts], None]


@contextmanager
def page_layout(studio: Studio, t: Texts, page: str) -> Iterator[None]:
    """Makes the head of a page; the body goes into the page's main part."""
    gr.HTML(header_html(t, page), elem_id="head", padding=False)
    # Elsewhere Gradio's sign-in would act as the owner of the machine.
    if is_space() and os.environ.get("OAUTH_CLIENT_ID"):
        gr.LoginButton(t("frame.sign_in"), size="sm", elem_id="sign-in")
    now = gr.HTML("", elem_id="now", padding=False)
    with gr.Column(elem_id="page"):
        yield
    news = gr.Timer(HEADER_SECONDS)
    seen = gr.State("")

    def look(before: str, request: gr.Request) -> tuple[object, object]:
        text = active_run_banner(studio, t, request, page)
        return (gr.skip(), gr.skip()) if text == before else (text, text)

    news.tick(look, seen, [now, seen], **timer_options())
    on_load(look, seen, [now, seen])


def on_load(handler: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Calls a handler when the page that is being built is opened, and returns that event.

    ``gr.on`` without triggers would call it after each change of its inputs too.
    """
    return root_block().load(handler, inputs, outputs, **timer_options())


def timer_options() -> dict[str, Any]:
    """Returns the options of an event that a timer sets off.

    Outside the queue it is one request instead of two, and no visitor waits for another.
    """
    return {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def event_options() -> dict[str, Any]:
    """Returns the options of an event that a visitor sets off: it is not part of the API."""
    return {"api_visibility": "private"}


def header_html(t: Texts, page: str) -> str:
    """Returns the HTML of the head: name, links, language, and light or dark."""
    links = "".join(
        f'<a href="{t.url(name)}"{_current(name == page)}>{t("frame.to_" + (name or "home"))}</a>'
        for name in LINKS
    )
    languages = "".join(
        f'<a href="{Texts(code).url(page)}" lang="{code}" hreflang="{code}" data-keeps-query'
        f"{_current(code == t.language)}>{name}</a>"
        for code, name in LANGUAGES.items()
    )
    label = t("frame.light_or_dark")
    return (
        f'<a class="skip" href="#page">{t("frame.skip")}</a>'
        f'<nav class="head" aria-label="{t("frame.navigation")}">'
        f'<a class="brand" href="{t.url()}"><span aria-hidden="true">\u26a1</span> '
        f"{t('frame.name')}</a>"
        f'<div class="links">{links}</div>'
        f'<div class="side"><div class="languages">{languages}</div>'
        f'<button type="button" id="light-or-dark" aria-label="{label}" title="{label}">'
        f'<span aria-hidden="true">\u263e</span></button></div></nav>'
    )


def _current(is_current: bool) -> str:
    return ' aria-current="page"' if is_current else ""


def current_run_id(request: gr.Request) -> str:
    """Returns which run the address of a visitor's page names; empty if none.

    Where the page is opened, that is the address of the request; later it is where that comes from.
    """
    return str(request.query_params.get("run") or "") or referring_run_id(request)


def referring_run_id(request: gr.Request) -> str:
    """Returns which run the page names that a request comes from; empty if none."""
    query = parse_qs(urlsplit(str(request.headers.get("referer", ""))).query)
    return (query.get("run") or [""])[0]


def active_run_banner(studio: Studio, t: Texts, request: gr.Request, page: str) -> str:
    """Returns the HTML that says which run of this visitor is going on; empty if there is none.

    The page of a run says of others alone.
    """
    runs = studio.store.list(owner_of(request, studio.settings.space))
    if page == "run":
        here = current_run_id(request)
        runs = [run for run in runs if run.id != here]
    active, waiting = [run for run in runs if run.active], [run for run in runs if run.waiting]
    if not active and not waiting:
        return ""
    first = (active or waiting)[0]
    count = t("run.going_on", n=len(active)) if active else ""
    queue = t("run.waiting_count", n=len(waiting)) if waiting else ""
    done = percent_done(first)
    facts = [first.name]
    if active:
        facts += [t("run.percent", percent=done) if done is not None else phase_text(first, t)]
        facts += filter(None, [time_left(first, t)])
    url = escaped(t.url("run", run=first.id))
    said = ", ".join(filter(None, [count, queue]))
    return (
        f'<div class="now"><span aria-hidden="true">{STATE_ICONS[first.status.state]}</span>'
        f'<span>{said}</span><a href="{url}">{escaped(", ".join(facts))}</a></div>'
    )


def page_title(t: Texts, page: str) -> str:
    """Returns the title of a page."""
    return f"{t('frame.title_' + (page or 'home'))} - {t('frame.name')}"


def heading(text: str, below: str = "") -> None:
    """Shows the heading of a page, and a sentence below it."""
    more = f"<p>{escaped(below)}</p>" if below else ""
    gr.HTML(f"<h1>{escaped(text)}</h1>{more}", elem_classes="heading", padding=False)
