"""State of a run page; only changed parts are sent to the browser."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.pages.components import Update, changed_updates, markup, timer_options
from gradio_app.pages.layout import referring_run_id
from gradio_app.pages.templating import render
from gradio_app.runs.hf_jobs import JobsExecutor
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import token_of

# Seconds since the start of a run after which its page requests news less often: how many ticks
# apart.
TICK_FACTORS = ((60.0, 1.0), (600.0, 2.0))
SLOWEST_TICK = 5.0
# A run that rests may be resumed in another tab, or by the command line.
IDLE_TICK = 10.0
_SMOOTHING = {"none": 0.0, "light": 0.6, "strong": 0.9}


@dataclass(frozen=True)
class CurveOptions:
    """What a visitor has chosen to see.

    Attributes:
        smoothing: Weight of the past in the curves, 0 to 1.
        logarithmic: Whether the loss is on a log scale.
        first: The first step of the curves of the loss.
    """

    smoothing: float = 0.0
    logarithmic: bool = False
    first: float = 0

    @classmethod
    def of(cls, smoothing: Any = None, logarithmic: Any = None, first: Any = 0) -> CurveOptions:
        """Returns the options of three inputs; a browser can send anything."""
        first = first if isinstance(first, (int, float)) else 0
        return cls(_SMOOTHING.get(str(smoothing), 0.0), logarithmic is True, first)


class PageSection(Protocol):
    """A part of the page."""

    # Its components, in the order of what `updates` returns.
    outputs: list[Any]

    def updates(self, run: Run | None, choices: CurveOptions) -> list[Update]:
        """Returns how a run is shown; ``None`` where there is none."""


class RunView:
    """All parts of the page of a run, for whoever looks at it.

    Attributes:
        run_id: The run that is looked at; empty where there is none.
        click_inputs: What a click sends: run and choices. It is answered with everything.
        outputs: What handlers return.
    """

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        self.run_id = gr.State("")
        self._seen = gr.Textbox(visible=False, elem_id="run-seen")
        self._timer = gr.Timer(studio.settings.tick_seconds, active=False)
        self._notice = markup(elem_id="run-notice")
        self._parts: list[PageSection] = []

    def add(self, part: PageSection) -> None:
        """Adds a part."""
        self._parts.append(part)

    def bind(self, tabs: gr.Tabs) -> None:
        """Binds the clock, once all parts are there."""
        choices = [choice for part in self._parts for choice in getattr(part, "choices", ())]
        self.click_inputs = [self.run_id, *choices]
        shown = [output for part in self._parts for output in part.outputs]
        self.outputs = [self.run_id, self._seen, self._timer, self._notice, tabs, *shown]
        inputs = [self.run_id, self._seen, *choices]
        for event in (self._timer.tick, *(choice.change for choice in choices)):
            event(self.on_tick, inputs, self.outputs, **timer_options())

    def on_load(self, request: gr.Request) -> list[Any]:
        """Shows the run that the address names."""
        return self.update(str(request.query_params.get("run") or ""), "", (), request)

    def on_tick(self, request: gr.Request, run_id: str, seen: Any, *choices: Any) -> list[Any]:
        """Shows what has changed."""
        return self.update(requested_run_id(run_id, request), seen, choices, request)

    def update(
        self, run_id: str, seen: Any, choices: Any, request: gr.Request, notice: str = "unknown"
    ) -> list[Any]:
        """Returns the updates that the browser does not have yet.

        Without ``seen`` it is sent everything; ``notice`` is said where there is no such run.
        """
        run = self._find_run(run_id, request)
        there, options = run is not None, CurveOptions.of(*choices)
        text = (
            "" if there else render("run.notice", self.t, name=notice if run_id else "none_chosen")
        )
        # A sweep trains in runs of their own.
        tabs = run is not None and not run.is_sweep
        items: list[Update] = [self._clock(run), text, (gr.Tabs(visible=tabs), tabs)]
        for part in self._parts:
            items += part.updates(run, options)
        known, values = changed_updates(items, seen)
        return [run.id if run is not None else "", known, *values]

    def _find_run(self, run_id: str, request: gr.Request) -> Run | None:
        try:
            run = self.studio.run(request, run_id)
        except UserError:
            return None
        executor = self.studio.store.executor(run)
        if isinstance(executor, JobsExecutor):
            executor.look(run.folder, token_of(request))
        return run

    def _clock(self, run: Run | None) -> Update:
        seconds, there = self.studio.settings.tick_seconds, run is not None
        if run is None or not (run.active or run.waiting):
            seconds *= IDLE_TICK
        else:
            begun = run.metadata.launched or run.status.started
            passed = 0.0 if run.waiting else time.time() - begun
            seconds *= next((slow for limit, slow in TICK_FACTORS if passed < limit), SLOWEST_TICK)
        return gr.Timer(seconds, active=there), (seconds, there)


def requested_run_id(run_id: str, request: gr.Request) -> str:
    """Returns the run that a page shows, also to a server that has forgotten that page.

    The address of the page names it, and is checked like any other id.
    """
    return run_id or referring_run_id(request)
