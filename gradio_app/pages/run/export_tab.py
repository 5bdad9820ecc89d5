"""Export tab: adapter files, other formats, and upload to the hub."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE, script
from gradio_app.errors import UserError
from gradio_app.export.archive import build_archive
from gradio_app.export.request import (
    BITS,
    FORMATS,
    GGUF_FORMATS,
    OUTTYPES,
    ExportRequest,
    formats_of,
    validate_request,
)
from gradio_app.pages.components import (
    Update,
    changed_updates,
    field,
    html,
    on_event,
    timer_options,
)
from gradio_app.pages.run import export_html
from gradio_app.pages.run_state import checkpoint_label
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import token_of
from lightning_peft.compat.gradio import event_data

# While an export is going on, and while there is none.
SECONDS, SLOW_SECONDS = 1.0, 5.0
_SAVE = script("download.js")
# Where the field of the repository is not among what is sent.
_NO_UPLOAD = object()


class ExportInputs(NamedTuple):
    """Values of the components of the tab, in the order in which they are sent."""

    run_id: str
    seen: Any = None
    kind: Any = None
    checkpoint: Any = None
    bits: Any = None
    outtype: Any = None
    measure: Any = None
    base: Any = None
    repository: Any = _NO_UPLOAD
    private: Any = True


class ExportTab:
    """The tab of what can be exported, and has been."""

    def __init__(self, studio: Studio, t: Texts, run_id: gr.State) -> None:
        self.studio, self.t, self._run_id = studio, t, run_id
        # The folder of runs is never served: what is downloaded is packed here first.
        self._staging = tempfile.TemporaryDirectory(prefix="lightning-peft-exports-")
        self._seen, self._asked = gr.State(""), gr.State("")
        self._timer = gr.Timer(SLOW_SECONDS)
        html(f"<h2>{t('export.heading')}</h2><p class='note'>{t('export.below')}</p>")
        self._empty = html(elem_id="export-empty")
        with gr.Column(elem_id="export-form", visible=False) as self._form:
            self._build_form()
            self._build_hub()
        self._build_confirmation()
        self._now = html(elem_id="export-now", js_on_load=CLICK_DELEGATE)
        self._list = html(elem_id="export-list", js_on_load=CLICK_DELEGATE)
        self._file = gr.DownloadButton(visible=False)
        self._chosen: list[Any] = [
            *(self._kind, self._checkpoint, self._bits, self._outtype, self._measure)
        ]
        self._inputs = [run_id, self._seen, *self._chosen]
        self._outputs = [
            *(self._seen, self._asked, self._timer, self._empty, self._form, self._kind),
            *(self._checkpoint, self._about, self._bits, self._outtype, self._measure),
            *(self._confirmation, self._listed, self._now, self._list),
        ]

    def _build_form(self) -> None:
        t = self.t
        formats = ("export.format_", FORMATS)
        self._kind = field(gr.Radio, t, "export.format", "export-format", formats, value="adapter")
        self._about = html(elem_id="export-about")
        with gr.Row(elem_id="export-choices"):
            self._checkpoint = field(
                gr.Dropdown, t, "export.checkpoint", "export-checkpoint", choices=[]
            )
            self._base = field(
                gr.Textbox, t, "export.base_name", "export-base-name", max_length=200
            )
            bits = [(t("export.bits_of", n=bits), bits) for bits in BITS]
            self._bits = field(
                gr.Radio,
                t,
                "export.bits",
                "export-bits",
                choices=bits,
                value=BITS[0],
                visible=False,
            )
            outtypes = ("export.outtype_", OUTTYPES)
            self._outtype = field(
                gr.Radio,
                t,
                "export.outtype",
                "export-outtype",
                outtypes,
                value=OUTTYPES[0],
                visible=False,
            )
        self._measure = field(gr.Checkbox, t, "export.measure", "export-measure", visible=False)
        self._start = self._button("start", "export-start", variant="primary")

    def _build_hub(self) -> None:
        t = self.t
        with gr.Accordion(t("export.hub"), open=False, elem_id="export-hub"):
            html(f'<p class="note">{t("export.hub_below")}</p>')
            self._repository = field(
                gr.Textbox,
                t,
                "export.repository",
                "export-repository",
                max_length=200,
                placeholder="my-name/my-adapter",
            )
            options: Any = {"value": True, "elem_classes": "warns"}
            self._private = field(gr.Checkbox, t, "export.private", "export-private", **options)
            self._preview = self._button("preview", "export-preview")

    def _build_confirmation(self) -> None:
        t, here = self.t, "space" if self.studio.settings.space else "here"
        # No form: no browser offers to keep what is typed here.
        with gr.Column(elem_id="export-confirm", visible=False) as self._confirmation:
            self._listed = html()
            self._token = field(
                gr.Textbox,
                t,
                "export.token",
                "export-token",
                info=t(f"export.token_{here}"),
                type="password",
                max_length=200,
                autofocus=False,
            )
            with gr.Row(elem_id="export-answers"):
                self._push = self._button("push", "export-push", variant="primary")
                self._not = self._button("do_not_push", "export-not")

    def _button(self, key: str, name: str, **options: Any) -> gr.Button:
        return gr.Button(self.t(f"export.{key}"), elem_id=name, scale=0, **options)

    def bind(self) -> None:
        """Binds what happens."""
        for event in (self._run_id.change, self._timer.tick, *(c.input for c in self._chosen)):
            event(self.refresh, self._inputs, self._outputs, **timer_options())
        on, inputs, outputs = partial(on_event, self.t), self._inputs, self._outputs
        given, push_inputs = [*inputs, self._base], [self._asked, *inputs]
        on(self._start.click, self._start_export, given, outputs)
        to_hub = [*given, self._repository, self._private]
        on(self._preview.click, self._start_export, to_hub, outputs)
        shown = [self._token, *outputs]
        on(self._push.click, self._push_export, [self._token, *push_inputs], shown)
        on(self._not.click, self._discard_export, push_inputs, shown)
        for part in (self._now, self._list):
            acted = on(part.click, self._act, inputs, [self._file, *outputs])
            acted.success(None, self._file, None, js=_SAVE)

    def refresh(self, request: gr.Request, *values: Any) -> list[Any]:
        """Returns the changed updates."""
        inputs = ExportInputs(*values)
        try:
            run = self.studio.run(request, inputs.run_id)
        except UserError:
            return [gr.skip()] * len(self._outputs)
        known, updates = changed_updates(self._items(run, inputs), inputs.seen)
        return [known, *updates]

    def _items(self, run: Run, inputs: ExportInputs) -> list[Update]:
        """Returns the update of each output after the first."""
        t, exports, formats = self.t, self.studio.exports.list(run), formats_of(run)
        kind = inputs.kind if inputs.kind in formats else formats[0]
        offered = [(t(f"export.format_{name}"), name) for name in formats]
        checkpoints = {one.name: one for one in run.checkpoints()}
        names = list(checkpoints)
        name = inputs.checkpoint if inputs.checkpoint in names else next(iter(names), None)
        labels = tuple((checkpoint_label(one, t), one.name) for one in checkpoints.values())
        checkpoint = checkpoints[name] if name else None
        request = ExportRequest(
            kind,
            name or "",
            bits=inputs.bits if inputs.bits in BITS else BITS[0],
            outtype=inputs.outtype if inputs.outtype in OUTTYPES else OUTTYPES[0],
            measure=inputs.measure is True,
        )
        asks = next((one for one in exports if one.state == "asks"), None)
        active = [one for one in exports if one.active]
        ended = [one for one in exports if not one.active]
        seconds = SECONDS if active else SLOW_SECONDS
        quantized, gguf, there = kind == "quantized", kind in GGUF_FORMATS, bool(checkpoints)
        return [
            asks.name if asks else "",
            (gr.Timer(seconds), seconds),
            "" if there else export_html.empty(run, t),
            (gr.Column(visible=there), there),
            (gr.Radio(choices=offered, value=kind), formats),
            (gr.Dropdown(choices=list(labels), value=name), (labels, name)),
            export_html.about(self.studio, run, request, checkpoint, t) if checkpoint else "",
            (gr.Radio(visible=quantized), quantized),
            (gr.Radio(visible=gguf), gguf),
            (gr.Checkbox(visible=request.writes_model), request.writes_model),
            (gr.Column(visible=asks is not None), asks is not None),
            export_html.push_confirmation(run, asks, t) if asks else "",
            export_html.active_exports(run, active, t),
            export_html.finished_exports(run, ended, t),
        ]

    def _start_export(self, request: gr.Request, *values: Any) -> list[Any]:
        inputs, owner = ExportInputs(*values), self.studio.owner(request)
        wanted = validate_request(
            self.studio.store.get(owner, inputs.run_id),
            inputs.kind,
            inputs.checkpoint,
            bits=inputs.bits,
            outtype=inputs.outtype,
            measure=inputs.measure,
            base_name=inputs.base,
            push_to=None if inputs.repository is _NO_UPLOAD else str(inputs.repository or ""),
            private=inputs.private,
        )
        self.studio.exports.start(owner, inputs.run_id, wanted)
        return self.refresh(request, *values)

    def _push_export(self, request: gr.Request, token: Any, name: str, *values: Any) -> list[Any]:
        given = str(token or "").strip() or token_of(request)
        self.studio.exports.push(
            self.studio.owner(request), ExportInputs(*values).run_id, name, given
        )
        return ["", *self.refresh(request, *values)]

    def _discard_export(self, request: gr.Request, name: str, *values: Any) -> list[Any]:
        self.studio.exports.delete(self.studio.owner(request), ExportInputs(*values).run_id, name)
        return ["", *self.refresh(request, *values)]

    def _act(self, request: gr.Request, event: gr.EventData, *values: Any) -> list[Any]:
        """Does what a button of the list requests."""
        owner, exports = self.studio.owner(request), self.studio.exports
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
