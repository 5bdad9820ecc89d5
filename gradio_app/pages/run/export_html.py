"""HTML of available and finished exports."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from gradio_app.errors import UserError
from gradio_app.export.base_size import base_size
from gradio_app.export.record import Export, loading_code
from gradio_app.export.request import GGUF_FORMATS, ExportRequest
from gradio_app.pages.error_reporting import localized_message
from gradio_app.pages.templating import render
from gradio_app.runs.formatting import format_bytes
from gradio_app.runs.types import Checkpoint, Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts

# States of an export as those of runs look.
_RUN_STATES = {
    "going": "running",
    "cancelling": "stopping",
    "cancelled": "stopped",
    "failed": "failed",
    "finished": "finished",
    "asks": "queued",
    "pushed": "finished",
}
# What the command line says where the page has a field for it.
_BASE_NOTE = "the files name the base as a folder of this machine"


def empty(run: Run, t: Texts) -> str:
    """Returns the notice before the first checkpoint."""
    text = t("export.empty_going" if run.active or run.waiting else "export.empty")
    return render("export.empty", t, text=text)


def about(
    studio: Studio, run: Run, request: ExportRequest, checkpoint: Checkpoint, t: Texts
) -> str:
    """Returns the description of an export: size, needs, and the reason of a refusal."""
    if request.writes_model:
        size = _size_note(request, checkpoint, studio, t)
    else:
        weights = checkpoint.folder / "adapter_model.safetensors"
        size = t("export.takes_adapter", size=format_bytes(weights.stat().st_size, t))
    refusal = ""
    try:
        studio.exports.check(run, request)
    except UserError as refused:
        # The one that is being made stands below.
        if refused.key != "export.refused_one":
            refusal = localized_message(refused, t)
    texts = [t(f"export.about_{request.format}"), size]
    return render("export.about", t, texts=texts, refusal=refusal)


def _size_note(request: ExportRequest, checkpoint: Checkpoint, studio: Studio, t: Texts) -> str:
    found = base_size(checkpoint.folder, studio.settings.data_root)
    if found is None:
        return t("export.takes_unknown")
    disk = found.merged_bytes
    if request.format == "quantized":
        disk = found.quantized_bytes(request.bits)
    elif request.format in GGUF_FORMATS:
        disk = found.gguf_bytes(request.outtype)
    memory = found.memory_bytes(request.format, request.measure)
    free = psutil.virtual_memory().available
    # Rounded, so that the sentence does not change at every look.
    words = t(
        "export.takes",
        size=format_bytes(disk, t),
        memory=format_bytes(memory, t),
        free=f"{round(free / 1e9)} GB",
    )
    return words + (" " + t("export.takes_more") if memory > free else "")


def push_confirmation(run: Run, export: Export, t: Texts) -> str:
    """Returns the list of files to push."""
    return render("export.push_confirmation", t, export=export, notes=_notes(run, export, t))


def active_exports(run: Run, exports: Sequence[Export], t: Texts) -> str:
    """Returns the exports that are in progress."""
    rows = []
    for export in exports:
        # Reading files one by one is said in the words of the command line.
        what, percent = export.progress
        rows.append((export, heading(export, t), _redacted(what, run, export), percent))
    return render("export.active", t, exports=rows)


def finished_exports(run: Run, exports: Sequence[Export], t: Texts) -> str:
    """Returns the exports that have ended."""
    checkpoints = {one.name: one for one in run.checkpoints()} if exports else {}
    rows = [_finished_export(run, export, checkpoints, t) for export in exports]
    return render("export.finished", t, exports=rows) if rows else ""


def _finished_export(
    run: Run, export: Export, checkpoints: Mapping[str, Checkpoint], t: Texts
) -> dict[str, Any]:
    found = checkpoints.get(export.request.checkpoint)
    code = loading_code(export, found.folder) if export.is_complete and found else ""
    return {
        "export": export,
        "heading": heading(export, t),
        "failure": _failure(run, export, t) if export.state == "failed" else None,
        "error": _error(export, t),
        "notes": _notes(run, export, t),
        "commands": [_redacted(command, run, export) for command in export.commands],
        "code": _redacted(code, run, export),
    }


def _redacted(text: str, run: Run, export: Export) -> str:
    """Returns a text of an export; on a Space, folders are those of the zip."""
    if run.redactor.settings.space:
        text = text.replace(str(export.output), export.run_name)
    return run.redactor.text(text)


def heading(export: Export, t: Texts) -> str:
    """Returns the title of an export: its format, state, checkpoint and moment."""
    look, state = _RUN_STATES[export.state], export.state
    if export.needs_template:
        look = state = "unfinished"
    request = export.request
    title = t(f"export.format_{request.format}")
    if request.format == "quantized":
        title += f", {t('export.bits_of', n=request.bits)}"
    if request.format == "gguf":
        title += f", {request.outtype}"
    moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(export.created))
    facts = [request.checkpoint, moment, *filter(None, [request.push_to])]
    return render("export.heading", t, title=title, state=state, look=look, facts=facts)


def _failure(run: Run, export: Export, t: Texts) -> tuple[str, str]:
    kind, said = export.failure
    key = kind if t.has(f"export.why_{kind}") else "other"
    if export.is_complete and kind == "explained":
        key = "push"
    return key, _redacted(said, run, export)


def _error(export: Export, t: Texts) -> str:
    """Returns how far the outputs are from the model as it was trained, where that is known."""
    result = export.result
    found: Any = (result.get("quantized") or {}).get("logit_error")
    merge = result.get("merge") or {}
    if "quantized" not in result:
        found = (merge.get("logit_errors") or {}).get(merge.get("into"))
    try:
        relative, same = float(found["relative"]), float(found["same_choice"])
    except (KeyError, TypeError, ValueError):
        return ""
    shares = {"relative": t.localized(f"{relative:.2%}"), "same": t.localized(f"{same:.1%}")}
    return t("export.error", **shares)


def _notes(run: Run, export: Export, t: Texts) -> list[str]:
    return [
        t("export.note_base") if _BASE_NOTE in note else _redacted(note, run, export)
        for note in export.notes
    ]
