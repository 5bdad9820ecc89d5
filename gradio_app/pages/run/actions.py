"""Actions on a run: one primary button, and the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from gradio_app.pages.components import Update, field, markup, on_event
from gradio_app.pages.run.sweep import compared_runs
from gradio_app.pages.run.view import CurveOptions, RunView, requested_run_id
from gradio_app.pages.templating import message, render
from gradio_app.runs.formatting import format_bytes
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts

# The next step first; which of them are offered depends on the run.
BUTTONS = ("stop", "resume", "start", "try_it", "save_now", "leave", "mark", "stop_now", "delete")
_PRIMARY = frozenset({"stop", "resume", "start", "try_it"})
_OPEN_PLAYGROUND = "() => document.querySelector('#tab-try-button')?.click()"
Action = Callable[[str, str], Any]


def available_actions(run: Run) -> set[str]:
    """Returns the buttons that a run has."""
    if run.waiting:
        return {"leave"}
    if run.active:
        asked = run.metadata.stop_asked is not None or run.status.state == "stopping"
        saves = run.status.state == "running" and not asked and not run.is_sweep
        steps = {"save_now"} if saves else set()
        return {"stop_now"} | (set() if asked else {"stop"}) | steps
    found = {"delete"}
    if run.status.state == "queued" or not (run.status.step or run.can_resume):
        # Nothing was learnt yet: it can begin again in its folder.
        return found | {"start"}
    if run.status.state == "crashed":
        found.add("mark")
    if run.can_resume:
        found.add("resume")
    trained = run.status.state == "finished" or (run.checkpoints() and not run.can_resume)
    if trained and not run.is_sweep:
        found.add("try_it")
    return found


class Actions:
    """The buttons of a run's page."""

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        with gr.Row(elem_id="run-actions"):
            self.buttons = {name: self._button(name) for name in BUTTONS}
            self._rename = gr.Button(
                t("run.rename"), elem_id="run-rename", size="md", visible=False, scale=0
            )
            self._duplicate = markup(elem_id="run-duplicate")
        self._confirmations = {name: self._build_confirmation(name) for name in ("kill", "delete")}
        with gr.Row(elem_id="run-renaming", visible=False) as self._renaming:
            self._name = field(gr.Textbox, t, "run.new_name", "run-new-name", max_length=80)
            self._save_name = gr.Button(t("run.save_name"), variant="primary", scale=0)
            self._keep_name = gr.Button(t("run.keep_name"), scale=0)
        self.outputs: list[Any] = [
            *self.buttons.values(),
            self._rename,
            self._duplicate,
            self._confirmations["delete"][1],
        ]

    def _button(self, name: str) -> gr.Button:
        primary = name in _PRIMARY
        return gr.Button(
            self.t(f"run.{name}"),
            variant="primary" if primary else "secondary",
            size="lg" if primary else "md",
            elem_id=f"run-{name.replace('_', '-')}",
            elem_classes="main-action" if primary else None,
            visible=False,
            scale=0,
        )

    def _build_confirmation(self, what: str) -> tuple[Any, ...]:
        with gr.Row(elem_id=f"run-sure-{what}", elem_classes="sure", visible=False) as row:
            text = self.t(f"run.sure_{what}", name="", size="")
            question = markup(message("", text, self.t, role="alert"))
            yes = gr.Button(self.t(f"run.yes_{what}"), variant="stop", scale=0)
            no = gr.Button(self.t("run.no"), scale=0)
        return row, question, yes, no

    def updates(self, run: Run | None, choices: CurveOptions) -> list[Update]:
        """Returns which buttons a run has."""
        t, there = self.t, run is not None
        names = available_actions(run) if run is not None else set()
        shown: list[Update] = [
            (gr.Button(visible=name in names), name in names) for name in BUTTONS
        ]
        links = question = ""
        if run is not None:
            links = render(
                "run.links",
                t,
                # A sweep of the command line has configs of other names.
                duplicate=run.recipe_text and t.url("new", **{"from": run.id}) + "#method",
                compare=t.url("compare", runs=compared_runs(run)),
                # Where there is no other next step, it is this one.
                primary=not names & _PRIMARY,
            )
            if "resume" in names:
                from_step = t("run.resume_from", step=run.checkpoint_step)
                label = t("run.resume") if run.is_sweep else from_step
                shown[BUTTONS.index("resume")] = (gr.Button(label, visible=True), label)
            if "delete" in names:
                size = format_bytes(run.bytes, t)
                text = t("run.sure_delete", name=run.name, size=size)
                question = message("", text, t, role="alert")
        return [*shown, (gr.Button(visible=there), there), links, question]

    def bind(self, view: RunView) -> None:
        """Binds what the buttons do."""
        line, store, buttons = self.studio.queue, self.studio.store, self.buttons
        self._view = view
        does: dict[str, Action] = {
            "stop": line.stop,
            "save_now": line.save,
            "leave": line.cancel,
            "mark": store.mark_stopped,
            "start": lambda owner, run_id: line.add(store.get(owner, run_id)),
            "resume": lambda owner, run_id: line.add(store.get(owner, run_id), resume=True),
        }
        for name, do in does.items():
            self._on(buttons[name], do, self.t("run.saving") if name == "save_now" else "")
        buttons["try_it"].click(None, None, None, js=_OPEN_PLAYGROUND)
        for name, button, do in (
            ("kill", buttons["stop_now"], line.kill),
            ("delete", buttons["delete"], line.delete),
        ):
            row, _, yes, no = self._confirmations[name]
            self._toggle(button.click, row, True)
            self._toggle(no.click, row, False)
            self._toggle(self._on(yes, do).then, row, False)
        self._bind_name()

    def _toggle(self, event: Callable[..., Any], row: gr.Row, visible: bool) -> None:
        on_event(self.t, event, lambda: gr.Row(visible=visible), None, row)

    def _on(self, button: gr.Button, do: Action, info: str = "") -> Any:
        view, line = self._view, self.studio.queue

        def act(request: gr.Request, run_id: str, *choices: Any) -> list[Any]:
            run_id = requested_run_id(run_id, request)
            do(self.studio.owner(request), run_id)
            if info:
                gr.Info(info)
            notice = "gone" if do == line.delete else "unknown"
            return view.update(run_id, "", choices, request, notice)

        return on_event(self.t, button.click, act, view.click_inputs, view.outputs)

    def _bind_name(self) -> None:
        studio, view, t = self.studio, self._view, self.t

        def ask(run_id: str, request: gr.Request) -> tuple[Any, Any]:
            run = studio.run(request, requested_run_id(run_id, request))
            return gr.Row(visible=True), run.name

        def rename(request: gr.Request, name: str, run_id: str, *choices: Any) -> list[Any]:
            run_id = requested_run_id(run_id, request)
            studio.store.rename(studio.owner(request), run_id, name)
            return [gr.Row(visible=False), *view.update(run_id, "", choices, request)]

        on_event(t, self._rename.click, ask, view.run_id, [self._renaming, self._name])
        self._toggle(self._keep_name.click, self._renaming, False)
        events = (self._save_name.click, self._name.submit)
        given, shown = [self._name, *view.click_inputs], [self._renaming, *view.outputs]
        on_event(t, events, rename, given, shown)
