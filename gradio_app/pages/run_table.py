"""Table of runs on the home page: search, sort, rename, compare and delete."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE, script
from gradio_app.compare.selection import MAX_RUNS
from gradio_app.errors import UserError
from gradio_app.experiments.listing import STATES, Listing, Query, list_runs
from gradio_app.experiments.summaries import Summary
from gradio_app.guards import escaped
from gradio_app.pages.components import changed_updates, field, markup, on_event
from gradio_app.pages.error_reporting import localized_message
from gradio_app.pages.run_state import state_badge
from gradio_app.pages.templating import render
from gradio_app.recipe.fields import BY_PATH
from gradio_app.recipe.presets import DEMO_BASE
from gradio_app.runs.formatting import (
    format_bytes,
    format_duration,
    format_metric,
    metric,
    time_ago,
)
from gradio_app.runs.store import NAME_LENGTH, NOTES_LENGTH
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from lightning_peft.compat.gradio import event_data


class RunTable:
    """The table with its search, and the fields for name, tags and notes of one of its runs."""

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        markup(render("home.title", t), elem_id="runs-title")
        with gr.Row(elem_id="find-runs", visible=False) as self._find:
            hint = t("home.search_hint")
            self._search = field(
                gr.Textbox, t, "home.search", "search-runs", info=None, placeholder=hint
            )
            self._state = field(
                gr.Dropdown, t, "home.show", "show-runs", ("home.show_", STATES), value="all"
            )
        with gr.Column(elem_id="edit-run", visible=False) as self._panel:
            self._name = field(gr.Textbox, t, "home.name", "edit-name", max_length=NAME_LENGTH)
            self._tags = field(gr.Textbox, t, "home.tags", max_length=400)
            self._notes = field(gr.Textbox, t, "home.notes", lines=2, max_length=NOTES_LENGTH)
            with gr.Row():
                self._save = gr.Button(t("home.save"), variant="primary", scale=0)
                self._cancel = gr.Button(t("home.cancel"), scale=0)
        self._table = markup(elem_id="runs", js_on_load=CLICK_DELEGATE + script("choosing.js"))
        self._query, self._edited = gr.State(Query()), gr.State("")
        self._seen = gr.Textbox(visible=False)
        self.inputs = [self._query, self._search, self._state, self._seen]
        self.outputs = [self._find, self._table, self._seen]

    def updates(
        self, owner: str, query: Any = None, search: Any = "", state: Any = "all", seen: Any = ""
    ) -> list[Any]:
        """Returns the updates that a browser does not have yet."""
        query = _checked(query).searching(search, state)
        store = self.studio.store
        runs, deleted = store.list(owner), store.deleted(owner)
        found = list_runs(runs, self.studio.summaries, query)
        # Of others, and of those that are gone, nothing is selected.
        picked = [run for run in runs if run.id in query.picked]
        there = bool(found.all)
        table = run_table(found, self.t, picked, deleted)
        known, values = changed_updates([(gr.Row(visible=there), there), table], seen)
        return [*values, known]

    def bind(self) -> None:
        """Binds what happens."""
        t, studio = self.t, self.studio
        panel = [self._panel, self._edited, self._name, self._tags, self._notes]
        shown = [*self.outputs, self._query, self._search]

        def find(query: Any, search: Any, state: Any, request: gr.Request) -> list[Any]:
            query = _checked(query).searching(search, state)
            return [*self.updates(studio.owner(request), query, search, state, ""), query]

        def act(
            query: Any, search: Any, state: Any, request: gr.Request, event: gr.EventData
        ) -> list[Any]:
            owner = studio.owner(request)
            query, words, fields = self._act(owner, _checked(query), event_data(event))
            search = search if words is None else words
            updates = self.updates(owner, query, search, state, "")
            return [*updates, query, search, *(fields or [gr.skip()] * len(panel))]

        def save(
            request: gr.Request, run: Any, name: Any, tags: Any, notes: Any, *given: Any
        ) -> list[Any]:
            owner = studio.owner(request)
            studio.store.describe(owner, run, name, tags, notes)
            return [gr.Column(visible=False), *self.updates(owner, *given)]

        given = self.inputs[:-1]
        events = [self._search.input, self._state.input]
        on_event(
            *(t, events, find, given, [*self.outputs, self._query]),
            show_progress="hidden",
            trigger_mode="always_last",
        )
        on_event(t, self._table.click, act, given, [*shown, *panel])
        saves = [self._save.click, self._name.submit, self._tags.submit]
        texts = [self._edited, self._name, self._tags, self._notes]
        on_event(t, saves, save, [*texts, *given], [self._panel, *self.outputs])
        on_event(t, self._cancel.click, lambda: gr.Column(visible=False), None, self._panel)

    def _act(
        self, owner: str, query: Query, data: dict[str, Any]
    ) -> tuple[Query, str | None, list[Any] | None]:
        """Does what a button requests: returns the query, another search, and fields to edit."""
        act, about = data.get("act"), str(data.get("run"))
        if act == "page":
            return query.on_page(about), None, None
        if act == "sort":
            return query.sorted_by(about), None, None
        if act == "tag":
            return query, f"#{about}", None
        if act == "edit":
            run = self.studio.store.get(owner, about)
            tags = ", ".join(run.metadata.tags)
            shown = [gr.Column(visible=True), run.id, run.name, tags, run.metadata.notes]
            return query, None, shown
        if act == "pick":
            # Of runs that are gone, nothing counts.
            here = frozenset(run.id for run in self.studio.store.list(owner))
            return replace(query, picked=query.picked & here).picking(about), None, None
        if act == "unpick":
            return replace(query, picked=frozenset()), None, None
        if act == "delete_picked":
            self._delete_picked(owner, query.picked)
            return replace(query, picked=frozenset()), None, None
        self._change_run(owner, act, about)
        return replace(query, picked=query.picked - {about}), None, None

    def _change_run(self, owner: str, act: object, about: str) -> None:
        store = self.studio.store
        if act == "delete":
            self.studio.queue.delete(owner, about)
        elif act == "restore":
            store.restore(owner, about)
        elif act == "erase":
            store.erase_now(owner, about)

    def _delete_picked(self, owner: str, picked: Collection[str]) -> None:
        """Deletes the selected runs that can be, and says why the others cannot."""
        refused = []
        for run in self.studio.store.list(owner):
            if run.id in picked:
                try:
                    self.studio.queue.delete(owner, run.id)
                except UserError as error:
                    refused.append(localized_message(error, self.t))
        if refused:
            text = escaped("\n".join(refused))
            gr.Warning(text, title=self.t("frame.refused"), duration=None)


def _checked(query: Any) -> Query:
    return query if isinstance(query, Query) else Query()


def run_table(
    found: Listing, t: Texts, picked: Sequence[Run] = (), deleted: Sequence[Run] = ()
) -> str:
    """Returns the HTML of a page of the runs, of those selected, and of those to restore."""
    rows = [_row(run, summary, t) for run, summary in found.rows]
    return render(
        "home.run_table",
        t,
        rows=rows,
        found=found,
        columns=_COLUMNS,
        picked=picked,
        most=MAX_RUNS,
        deleted=deleted,
    )


# What is in a column, by what it can be sorted by.
_COLUMNS = [
    one.split() for one in ("name", "state", "model data", "method", "best", "time memory", "when")
]


def _row(run: Run, found: Summary, t: Texts) -> dict[str, Any]:
    best = ""
    if found.best is not None:
        best = format_metric(found.best, t)
    kinds = {"train_loss": t("run.train_loss")}
    model = t("new.demo_base") if found.model == DEMO_BASE else found.model
    return {
        "run": run,
        "state": state_badge(run, t),
        "model": [model, found.data],
        "method": [
            ", ".join(filter(None, [t("run.sweep") if run.is_sweep else "", found.method])),
            t(f"new.task_{found.task}") if t.has(f"new.task_{found.task}") else found.task,
            ", ".join(
                f"{t(f'fields.{BY_PATH[path].key}')} {t.localized(value)}"
                for path, value in found.settings
            ),
        ],
        "best": [best, kinds.get(found.metric) or metric(found.metric, t)] if best else [],
        "time": [
            format_duration(found.seconds, t) if found.seconds else "",
            format_bytes(found.memory, t) if found.memory else "",
        ],
        "when": [time_ago(run.created, t) if run.created else ""],
    }
