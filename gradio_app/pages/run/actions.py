"""What can be done to a run: one large next step, and the rest next to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from gradio_app.guards import escaped
from gradio_app.pages.error_reporting import report_errors
from gradio_app.pages.layout import event_options
from gradio_app.pages.markup import markup
from gradio_app.pages.run.view import (
    ComponentUpdate,
    CurveOptions,
    RunView,
    html_update,
    requested_run_id,
)
from gradio_app.runs.formatting import format_bytes
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import owner_of

# The next step first; which of them are offered depends on the run.
BUTTONS = ("stop", "resume", "start", "try_it", "save_now", "leave", "mark", "stop_now", "delete")
_PRIMARY = frozenset({"stop", "resume", "start", "try_it"})
_DANGEROUS = frozenset({"stop_now", "delete"})


def available_actions(run: Run) -> set[str]:
    """Returns the buttons that a run has."""
    if run.waiting:
        return {"leave"}
    if run.active:
        asked = run.metadata.stop_asked is not None or run.status.state == "stopping"
        steps = {"save_now"} if run.status.state == "running" and not asked else set()
        return {"stop_now"} | (set() if asked else {"stop"}) | steps
    found = {"delete"}
    if run.status.state == "queued" or not (run.status.step or run.can_resume):
        # Nothing was learnt yet: it can begin again in its folder.
        return found | {"start"}
    if run.status.state == "crashed":
        found.add("mark")
    if run.can_resume:
        found.add("resume")
    if run.status.state == "finished" or (run.checkpoints() and not run.can_resume):
        found.add("try_it")
    return found


def _alert(text: str) -> str:
    return f'<p role="alert">{escaped(text)}</p>'


class Actions:
    """The buttons of a run's page."""

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        self.buttons: dict[str, gr.Button] = {}
        with gr.Row(elem_id="run-actions"):
            for name in BUTTONS:
                self.buttons[name] = gr.Button(
                    t(f"run.{name}"),
                    variant="primary" if name in _PRIMARY else "secondary",
                    size="lg" if name in _PRIMARY else "md",
                    elem_id=f"run-{name.replace('_', '-')}",
                    elem_classes="main-action" if name in _PRIMARY else None,
                    visible=False,
                    scale=0,
                )
            self._rename = gr.Button(
                t("run.rename"), elem_id="run-rename", size="md", visible=False, scale=0
            )
            self._duplicate = markup("", elem_id="run-duplicate")
        self._confirmations = {name: self._build_confirmation(name) for name in ("kill", "delete")}
        with gr.Row(elem_id="run-renaming", visible=False) as self._renaming:
            self._name = gr.Textbox(
                label=t("run.new_name"), max_length=80, elem_id="run-new-name", interactive=True
            )
            self._save_name = gr.Button(t("run.save_name"), variant="primary", scale=0)
            self._keep_name = gr.Button(t("run.keep_name"), scale=0)
        self.outputs: list[Any] = [
            *self.buttons.values(),
            self._rename,
            self._duplicate,
            self._question,
        ]

    def _build_confirmation(self, what: str) -> tuple[Any, gr.Button, gr.Button]:
        with gr.Row(elem_id=f"run-sure-{what}", elem_classes="sure", visible=False) as row:
            known = {"name": "", "size": ""}
            text = markup(_alert(self.t(f"run.sure_{what}", **known)))
            yes = gr.Button(self.t(f"run.yes_{what}"), variant="stop", scale=0)
            no = gr.Button(self.t("run.no"), scale=0)
        if what == "delete":
            self._question = text
        return row, yes, no

    def updates(self, run: Run | None, choices: CurveOptions) -> list[ComponentUpdate]:
        """Returns which buttons a run has."""
        names = available_actions(run) if run is not None else set()
        shown = [
            ComponentUpdate(gr.Button(visible=name in names), name in names) for name in BUTTONS
        ]
        if run is not None and "resume" in names:
            label = self.t("run.resume_from", step=run.checkpoint_step)
            shown[BUTTONS.index("resume")] = ComponentUpdate(gr.Button(label, visible=True), label)
        there = run is not None
        link = question = ""
        if run is not None:
            url = escaped(self.t.url("new", **{"from": run.id}) + "#method")
            # Where there is no other next step, it is this one.
            looks = "as-button" if names & _PRIMARY else "as-button primary"
            link = f'<a class="{looks}" href="{url}">{self.t("run.duplicate")}</a>'
            other = escaped(self.t.url("compare", runs=run.id))
            link += f' <a class="as-button" href="{other}">{self.t("compare.with_another")}</a>'
            if "delete" in names:
                whole = format_bytes(run.bytes, self.t)
                question = _alert(self.t("run.sure_delete", name=run.name, size=whole))
        return [
            *shown,
            ComponentUpdate(gr.Button(visible=there), there),
            html_update(link),
            html_update(question),
        ]

    def bind(self, view: RunView) -> None:
        """Binds what the buttons do."""
        line, store = self.studio.queue, self.studio.store
        self._view = view
        does: dict[str, Callable[[str, str], Any]] = {
            "stop": line.stop,
            "save_now": line.save,
            "leave": line.cancel,
            "mark": store.mark_stopped,
            "start": lambda owner, run_id: line.add(store.get(owner, run_id)),
            "resume": lambda owner, run_id: line.add(store.get(owner, run_id), resume=True),
        }
        for name, do in does.items():
            said = self.t("run.saving") if name == "save_now" else ""
            self._on(self.buttons[name], do, said)
        self.buttons["try_it"].click(
            None, None, None, js="() => document.querySelector('#tab-try-button')?.click()"
        )
        self._bind_confirmation("kill", self.buttons["stop_now"], line.kill)
        self._bind_confirmation("delete", self.buttons["delete"], store.delete)
        self._bind_name()

    def _on(self, button: gr.Button, do: Callable[[str, str], Any], said: str = "") -> Any:
        view = self._view

        @report_errors(self.t)
        def act(run_id: str, smoothing: Any, logarithmic: Any, request: gr.Request) -> list[Any]:
            run_id = requested_run_id(run_id, request)
            do(owner_of(request, self.studio.settings.space), run_id)
            if said:
                gr.Info(said)
            notice = "gone" if do == self.studio.store.delete else "unknown"
            return view.update(run_id, "", (smoothing, logarithmic), request, notice)

        return button.click(act, view.click_inputs, view.outputs, **event_options())

    def _bind_confirmation(
        self, name: str, button: gr.Button, do: Callable[[str, str], Any]
    ) -> None:
        row, yes, no = self._confirmations[name]
        button.click(lambda: gr.Row(visible=True), None, row, **event_options())
        no.click(lambda: gr.Row(visible=False), None, row, **event_options())
        self._on(yes, do).then(lambda: gr.Row(visible=False), None, row, **event_options())

    def _bind_name(self) -> None:
        studio, view = self.studio, self._view

        @report_errors(self.t)
        def ask(run_id: str, request: gr.Request) -> tuple[Any, Any]:
            owner = owner_of(request, studio.settings.space)
            run = studio.store.get(owner, requested_run_id(run_id, request))
            return gr.Row(visible=True), run.name

        @report_errors(self.t)
        def rename(
            name: str, run_id: str, smoothing: Any, logarithmic: Any, request: gr.Request
        ) -> list[Any]:
            run_id = requested_run_id(run_id, request)
            studio.store.rename(owner_of(request, studio.settings.space), run_id, name)
            shown = view.update(run_id, "", (smoothing, logarithmic), request)
            return [gr.Row(visible=False), *shown]

        self._rename.click(ask, view.run_id, [self._renaming, self._name], **event_options())
        self._keep_name.click(
            lambda: gr.Row(visible=False), None, self._renaming, **event_options()
        )
        given = [self._name, *view.click_inputs]
        for event in (self._save_name.click, self._name.submit):
            event(rename, given, [self._renaming, *view.outputs], **event_options())
