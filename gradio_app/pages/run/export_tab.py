"""The tab that takes a run's adapter along: as files, for other programs, or to the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.errors import UserError
from gradio_app.export.archive import build_archive
from gradio_app.export.request import BITS, FORMATS, validate_request
from gradio_app.pages.error_reporting import report_errors
from gradio_app.pages.layout import event_options, timer_options
from gradio_app.pages.run import export_html
from gradio_app.pages.run.view import ComponentUpdate, html_update
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import owner_of, token_of
from lightning_peft.compat.gradio import event_data

# While an export is going on, and while there is none.
SECONDS, SLOW_SECONDS = 1.0, 5.0
_SAVE = """
(file) => {
  if (!file) return;
  const link = document.createElement('a');
  link.href = file.url;
  link.download = file.orig_name ?? '';
  link.click();
}
"""


# Where the field of the repository is not among what is sent.
_NO_UPLOAD = object()


class ExportInputs(NamedTuple):
    """Values of the components of the tab, in the order in which they are sent."""

    run_id: str
    seen: Any = None
    kind: Any = None
    checkpoint: Any = None
    bits: Any = None
    measure: Any = None
    base: Any = None
    repository: Any = _NO_UPLOAD
    private: Any = True


def build(studio: Studio, t: Texts, run_id: gr.State) -> None:
    """Makes the tab."""
    ExportTab(studio, t, run_id).bind()


class ExportTab:
    """The tab of what can be taken along.

    Args:
        studio: Shared parts of the server.
        t: Texts.
        run_id: The run of the page.
    """

    def __init__(self, studio: Studio, t: Texts, run_id: gr.State) -> None:
        self.studio, self.t, self._run_id = studio, t, run_id
        # The folder of runs is never served: what is downloaded is packed here first.
        self._staging = tempfile.TemporaryDirectory(prefix="lightning-peft-exports-")
        self._seen, self._asked = gr.State(()), gr.State("")
        self._timer = gr.Timer(SLOW_SECONDS)
        text = f"<h2>{t('export.heading')}</h2><p class='note'>{t('export.below')}</p>"
        gr.HTML(text, padding=False)
        self._empty = gr.HTML("", elem_id="export-empty", padding=False)
        with gr.Column(elem_id="export-form", visible=False) as self._form:
            self._build_form()
            self._build_hub()
        self._build_confirmation()
        self._now = gr.HTML("", elem_id="export-now", padding=False, js_on_load=CLICK_DELEGATE)
        self._list = gr.HTML("", elem_id="export-list", padding=False, js_on_load=CLICK_DELEGATE)
        self._file = gr.DownloadButton(visible=False)
        self._chosen: list[Any] = [self._kind, self._checkpoint, self._bits, self._measure]
        self._inputs = [run_id, self._seen, *self._chosen]
        self._outputs = [
            self._seen,
            self._asked,
            self._timer,
            self._empty,
            self._form,
            self._checkpoint,
            self._about,
            self._bits,
            self._measure,
            self._confirmation,
            self._listed,
            self._now,
            self._list,
        ]

    def _build_form(self) -> None:
        t = self.t
        self._kind = gr.Radio(
            [(t(f"export.format_{name}"), name) for name in FORMATS],
            value="adapter",
            label=t("export.format"),
            elem_id="export-format",
            interactive=True,
        )
        self._about = gr.HTML("", elem_id="export-about", padding=False)
        with gr.Row(elem_id="export-choices"):
            self._checkpoint = gr.Dropdown(
                [], label=t("export.checkpoint"), elem_id="export-checkpoint", interactive=True
            )
            self._base = gr.Textbox(
                label=t("export.base_name"),
                info=t("export.base_name_more"),
                max_length=200,
                elem_id="export-base-name",
                interactive=True,
            )
            self._bits = gr.Radio(
                [(t("export.bits_of", n=bits), bits) for bits in BITS],
                value=BITS[0],
                label=t("export.bits"),
                elem_id="export-bits",
                interactive=True,
                visible=False,
            )
        self._measure = gr.Checkbox(
            label=t("export.measure"),
            info=t("export.measure_more"),
            elem_id="export-measure",
            interactive=True,
            visible=False,
        )
        self._start = gr.Button(
            t("export.start"), variant="primary", elem_id="export-start", scale=0
        )

    def _build_hub(self) -> None:
        t = self.t
        with gr.Accordion(t("export.hub"), open=False, elem_id="export-hub"):
            gr.HTML(f'<p class="note">{t("export.hub_below")}</p>', padding=False)
            self._repository = gr.Textbox(
                label=t("export.repository"),
                placeholder="my-name/my-adapter",
                max_length=200,
                elem_id="export-repository",
                interactive=True,
            )
            self._private = gr.Checkbox(
                True,
                label=t("export.private"),
                info=t("export.private_more"),
                elem_id="export-private",
                interactive=True,
            )
            self._preview = gr.Button(t("export.preview"), elem_id="export-preview", scale=0)

    def _build_confirmation(self) -> None:
        t = self.t
        # No form: no browser offers to keep what is typed here.
        with gr.Column(elem_id="export-confirm", visible=False) as self._confirmation:
            self._listed = gr.HTML("", padding=False)
            here = "space" if self.studio.settings.space else "here"
            self._token = gr.Textbox(
                label=t("export.token"),
                info=t(f"export.token_{here}"),
                type="password",
                max_length=200,
                autofocus=False,
                elem_id="export-token",
                interactive=True,
            )
            with gr.Row(elem_id="export-answers"):
                self._push = gr.Button(
                    t("export.push"), variant="primary", elem_id="export-push", scale=0
                )
                self._not = gr.Button(t("export.do_not_push"), elem_id="export-not", scale=0)

    def bind(self) -> None:
        """Binds what happens."""
        for event in (self._run_id.change, self._timer.tick, *(c.input for c in self._chosen)):
            event(self.refresh, self._inputs, self._outputs, **timer_options())
        self._bind_start()
        self._bind_push()
        for part in (self._now, self._list):
            part.click(
                report_errors(self.t)(self._act),
                self._inputs,
                [self._file, *self._outputs],
                **event_options(),
            ).success(None, self._file, None, js=_SAVE)

    def refresh(self, request: gr.Request, *values: Any) -> list[Any]:
        """Returns the changed updates."""
        inputs = ExportInputs(*values)
        try:
            run = self.studio.store.get(self._owner(request), inputs.run_id)
        except UserError:
            run = None
        items, seen = self._items(run, inputs), inputs.seen
        keys = tuple(hash(item.key) for item in items)
        before = seen if isinstance(seen, tuple) and len(seen) == len(keys) else (None,) * len(keys)
        updates = [
            gr.skip() if key == old else item.value
            for item, key, old in zip(items, keys, before, strict=True)
        ]
        return [gr.skip() if keys == before else keys, *updates]

    def _owner(self, request: gr.Request) -> str:
        return owner_of(request, self.studio.settings.space)

    def _items(self, run: Run | None, inputs: ExportInputs) -> list[ComponentUpdate]:
        """Returns the update of each output after the first."""
        t, kind = self.t, inputs.kind
        exports = self.studio.exports.list(run) if run is not None else []
        checkpoints = run.checkpoints() if run is not None else []
        names = [one.name for one in checkpoints]
        chosen_name = inputs.checkpoint if inputs.checkpoint in names else next(iter(names), None)
        checkpoint = next((one for one in checkpoints if one.name == chosen_name), None)
        labels = [(export_html.checkpoint_label(one, t), one.name) for one in checkpoints]
        form = export_html.ExportForm(kind, checkpoint, inputs.bits, inputs.measure is True)
        asks = next((one for one in exports if one.state == "asks"), None)
        going = any(one.active for one in exports)
        seconds = SECONDS if going else SLOW_SECONDS
        about = export_html.about(self.studio, run, form, t) if run and checkpoint else ""
        text = export_html.push_confirmation(run, asks, t) if run and asks else ""
        return [
            ComponentUpdate(asks.name if asks else "", asks.name if asks else ""),
            ComponentUpdate(gr.Timer(seconds), seconds),
            html_update("" if checkpoints or run is None else export_html.empty(run, t)),
            ComponentUpdate(gr.Column(visible=bool(checkpoints)), bool(checkpoints)),
            ComponentUpdate(
                gr.Dropdown(choices=labels, value=chosen_name), (tuple(labels), chosen_name)
            ),
            html_update(about),
            ComponentUpdate(gr.Radio(visible=kind == "quantized"), kind == "quantized"),
            ComponentUpdate(gr.Checkbox(visible=form.writes_model), form.writes_model),
            ComponentUpdate(gr.Column(visible=asks is not None), asks is not None),
            html_update(text),
            html_update(export_html.active_exports(run, [one for one in exports if one.active], t)),
            html_update(
                export_html.finished_exports(run, [one for one in exports if not one.active], t)
            ),
        ]

    def _bind_start(self) -> None:
        @report_errors(self.t)
        def start(request: gr.Request, *values: Any) -> list[Any]:
            inputs, owner = ExportInputs(*values), self._owner(request)
            wish = validate_request(
                self.studio.store.get(owner, inputs.run_id),
                inputs.kind,
                inputs.checkpoint,
                bits=inputs.bits,
                measure=inputs.measure,
                base_name=inputs.base,
                push_to=None if inputs.repository is _NO_UPLOAD else str(inputs.repository or ""),
                private=inputs.private,
            )
            self.studio.exports.start(owner, inputs.run_id, wish)
            return self.refresh(request, *values)

        given = [*self._inputs, self._base]
        self._start.click(start, given, self._outputs, **event_options())
        to_hub = [*given, self._repository, self._private]
        self._preview.click(start, to_hub, self._outputs, **event_options())

    def _bind_push(self) -> None:
        exports = self.studio.exports

        @report_errors(self.t)
        def push(request: gr.Request, token: Any, name: str, *values: Any) -> list[Any]:
            given = str(token or "").strip() or token_of(request)
            exports.push(self._owner(request), ExportInputs(*values).run_id, name, given)
            return ["", *self.refresh(request, *values)]

        @report_errors(self.t)
        def leave(request: gr.Request, name: str, *values: Any) -> list[Any]:
            exports.delete(self._owner(request), ExportInputs(*values).run_id, name)
            return ["", *self.refresh(request, *values)]

        given, shown = [self._asked, *self._inputs], [self._token, *self._outputs]
        self._push.click(push, [self._token, *given], shown, **event_options())
        self._not.click(leave, given, shown, **event_options())

    def _act(self, request: gr.Request, event: gr.EventData, *values: Any) -> list[Any]:
        """Does what a button of the list asks for."""
        owner, exports = self._owner(request), self.studio.exports
        run_id, data = ExportInputs(*values).run_id, event_data(event)
        act, name, file = data.get("act"), data.get("export"), None
        if act == "download":
            run, export = exports.get(owner, run_id, name)
            file = str(build_archive(export, run, Path(self._staging.name)))
        elif act == "cancel":
            exports.cancel(owner, run_id, name)
        elif act == "delete":
            exports.delete(owner, run_id, name)
        return [file, *self.refresh(request, *values)]
