"""Page frame: header with navigation and the active run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

import gradio as gr

from gradio_app.pages.components import html, on_load, timer_options
from gradio_app.pages.run_state import percent_done, phase_text, time_left
from gradio_app.pages.templating import render
from gradio_app.settings import is_space
from gradio_app.studio import Studio
from gradio_app.texts import LANGUAGES, Texts

# How often the head asks whether a run is going on. Nothing is sent where nothing has changed.
HEADER_SECONDS = 5.0
LINKS = ("", "new", "compare", "help")


@contextmanager
def page_layout(studio: Studio, t: Texts, page: str) -> Iterator[None]:
    """Makes the head of a page; the body goes into the page's main part."""
    html(header_html(t, page), elem_id="head")
    # Elsewhere Gradio's sign-in would act as the owner of the machine.
    if is_space() and os.environ.get("OAUTH_CLIENT_ID"):
        gr.LoginButton(t("frame.sign_in"), size="sm", elem_id="sign-in")
    now = html(elem_id="now")
    with gr.Column(elem_id="page"):
        yield
    seen = gr.State("")

    def look(before: str, request: gr.Request) -> tuple[object, object]:
        text = active_run_banner(studio, t, request, page)
        return (gr.skip(), gr.skip()) if text == before else (text, text)

    gr.Timer(HEADER_SECONDS).tick(look, seen, [now, seen], **timer_options())
    on_load(look, seen, [now, seen])


def header_html(t: Texts, page: str) -> str:
    """Returns the HTML of the head: name, links, language, and light or dark."""
    languages = [(code, name, Texts(code).url(page)) for code, name in LANGUAGES.items()]
    return render("frame.header", t, page=page, links=LINKS, languages=languages)


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
    runs = studio.store.list(studio.owner(request))
    if page == "run":
        here = current_run_id(request)
        runs = [run for run in runs if run.id != here]
    active, waiting = [run for run in runs if run.active], [run for run in runs if run.waiting]
    if not active and not waiting:
        return ""
    first = (active or waiting)[0]
    counts = [t("run.going_on", n=len(active))] if active else []
    counts += [t("run.waiting_count", n=len(waiting))] if waiting else []
    done = percent_done(first)
    facts = [first.name]
    if active:
        facts += [t("run.percent", percent=done) if done is not None else phase_text(first, t)]
        facts += filter(None, [time_left(first, t)])
    url = t.url("run", run=first.id)
    state = first.status.state
    return render("frame.active_run", t, state=state, counts=counts, url=url, facts=facts)


def page_title(t: Texts, page: str) -> str:
    """Returns the title of a page."""
    return f"{t('frame.title_' + (page or 'home'))} - {t('frame.name')}"


def heading(text: str, t: Texts, below: str = "") -> None:
    """Shows the heading of a page, and a sentence below it."""
    html(render("frame.heading", t, text=text, below=below), elem_classes="heading")
