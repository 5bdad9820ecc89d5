"""The HTML of what can be taken along, and of what has been. All that a run wrote is escaped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from gradio_app.errors import UserError
from gradio_app.export.base_size import BaseSize, base_size
from gradio_app.export.record import Export, loading_code
from gradio_app.export.request import BITS, FORMATS, FULL_MODEL_FORMATS, ExportRequest
from gradio_app.guards import escaped
from gradio_app.pages import run_state
from gradio_app.pages.confirmation import confirm_button, confirmation
from gradio_app.pages.error_reporting import localized_message
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
# Looks of a run's state that an export has besides.
STATE_ICONS = {**run_state.STATE_ICONS, "unfinished": "\u26a0"}
_MAX_FILES = 40
# What the command line says where the page has a field for it.
_BASE_NOTE = "the files name the base as a folder of this machine"


@dataclass(frozen=True)
class ExportForm:
    """What is chosen; a browser can send anything.

    Attributes:
        kind: What is wanted.
        checkpoint: Of which checkpoint.
        bits: Bits of a quantized model.
        measure: Whether outputs are compared.
    """

    kind: Any
    checkpoint: Checkpoint | None
    bits: Any
    measure: bool

    writes_model = property(lambda self: self.kind in FULL_MODEL_FORMATS)


def checkpoint_label(one: Checkpoint, t: Texts) -> str:
    """Returns the label of a checkpoint."""
    if one.step is None:
        return one.name
    return t("export.at_step", name=one.name, step=one.step)


def empty(run: Run, t: Texts) -> str:
    """Returns the notice before the first checkpoint."""
    text = t("export.empty_going" if run.active or run.waiting else "export.empty")
    title = t("export.empty_title")
    return f'<div class="nothing"><p><strong>{title}</strong></p><p>{text}</p></div>'


def about(studio: Studio, run: Run, form: ExportForm, t: Texts) -> str:
    """Returns the description of an export: size, needs, and the reason of a refusal."""
    if form.kind not in FORMATS or form.checkpoint is None:
        return ""
    parts = [t(f"export.about_{form.kind}")]
    if form.writes_model:
        found = base_size(form.checkpoint.folder, studio.settings.data_root)
        parts.append(_size_note(form, found, t))
    else:
        weights = form.checkpoint.folder / "adapter_model.safetensors"
        parts.append(t("export.takes_adapter", size=format_bytes(weights.stat().st_size, t)))
    text = f'<p class="note">{" ".join(map(escaped, parts))}</p>'
    try:
        studio.exports.check(run, ExportRequest(format=form.kind, checkpoint=form.checkpoint.name))
    except UserError as refusal:
        # The one that is being made stands below.
        if refusal.key == "export.refused_one":
            return text
        why = f"<strong>{t('export.not_now')}</strong> {escaped(localized_message(refusal, t))}"
        return f'{text}<p class="not-now" role="status">{why}</p>'
    return text


def _size_note(form: ExportForm, found: BaseSize | None, t: Texts) -> str:
    if found is None:
        return t("export.takes_unknown")
    bits = form.bits if form.bits in BITS else BITS[0]
    disk = found.quantized_bytes(bits) if form.kind == "quantized" else found.merged_bytes
    memory = found.memory_bytes(form.kind, form.measure)
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
    kind = t("export.is_private" if export.request.private else "export.is_public")
    total = format_bytes(sum(count for _, count in export.files), t)
    said = t(
        "export.would_push",
        n=len(export.files),
        size=total,
        to=export.request.push_to,
        kind=kind,
    )
    warning = (
        "" if export.request.private else f'<p class="not-now">{t("export.public_warning")}</p>'
    )
    return (
        f'<h3>{t("export.confirm")}</h3><p role="status">{escaped(said)}</p>{warning}'
        f"{_files(export, t)}{_notes(run, export, t)}"
    )


def active_exports(run: Run | None, exports: Sequence[Export], t: Texts) -> str:
    """Returns the exports that are going on."""
    return "".join(_active_export(run, export, t) for export in exports) if run is not None else ""


def _active_export(run: Run, export: Export, t: Texts) -> str:
    what, percent = export.progress
    what = _redacted(what, run, export)
    # Reading files one by one is said in the words of the command line.
    said = f"{what}, {percent} %" if percent is not None else t("export.begins")
    width = f' style="width: {percent}%"' if percent is not None else ""
    known = f' aria-valuenow="{percent}"' if percent is not None else ""
    stop = "" if export.state == "cancelling" else _button("cancel", export, t)
    return (
        f'<article class="export">{_heading(export, t)}'
        f'<div class="bar {"running" if percent is not None else "unknown"}" role="progressbar" '
        f'aria-label="{t("export.progress")}" aria-valuemin="0" aria-valuemax="100"{known}>'
        f"<span{width}></span></div>"
        f'<p class="note" role="status">{escaped(said)}. {t("export.goes_on")}</p>'
        f'<div class="acts">{stop}</div></article>'
    )


def finished_exports(run: Run | None, exports: Sequence[Export], t: Texts) -> str:
    """Returns the exports that have come to an end."""
    if run is None or not exports:
        return ""
    known = {one.name: one for one in run.checkpoints()}
    items = "".join(
        _finished_export(run, one, known.get(one.request.checkpoint), t) for one in exports
    )
    title = t("export.list")
    return f'<section aria-label="{title}"><h2>{title}</h2>{items}</section>'


def _finished_export(run: Run, export: Export, found: Checkpoint | None, t: Texts) -> str:
    parts = [_heading(export, t)]
    if export.state == "failed":
        parts.append(_failure(run, export, t))
    if export.address:
        url = escaped(export.address)
        parts.append(f'<p>{t("export.is_at")} <a href="{url}" rel="noopener">{url}</a></p>')
    if export.is_complete:
        parts.append(_error(export, t))
        # What waits to be uploaded is listed where that is asked.
        if export.state != "asks":
            todo = f'<p class="not-now" role="status">{t("export.todo_template")}</p>'
            parts += [
                todo if export.needs_template else "",
                _notes(run, export, t),
                _files(export, t),
            ]
        parts.append(_commands(run, export, t))
        code = loading_code(export, found.folder) if found is not None else ""
        parts.append(_code(_redacted(code, run, export), t) if code else "")
    buttons = [_button("download", export, t)] if export.is_complete else []
    buttons.append(confirm_button(export.name, t("export.delete")))
    parts.append(f'<div class="acts">{"".join(buttons)}</div>')
    whole = format_bytes(sum(count for _, count in export.files), t)
    kind = t(f"export.format_{export.request.format}")
    asked = t("export.sure_delete", name=kind, size=whole)
    parts.append(
        confirmation(export.name, asked, _button("delete", export, t, "run.yes_delete"), t)
    )
    return f'<article class="export">{"".join(parts)}</article>'


def _redacted(text: str, run: Run, export: Export) -> str:
    """Returns the card of an export; on a Space, folders are those of the zip."""
    if run.redactor.settings.space:
        text = text.replace(str(export.output), export.run_name)
    return run.redactor.text(text)


def _heading(export: Export, t: Texts) -> str:
    look, state = _RUN_STATES[export.state], export.state
    if export.needs_template:
        look = state = "unfinished"
    title = t(f"export.format_{export.request.format}")
    if export.request.format == "quantized":
        title += f", {t('export.bits_of', n=export.request.bits)}"
    facts = [
        export.request.checkpoint,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(export.created)),
    ]
    if export.request.push_to:
        facts.append(export.request.push_to)
    return (
        f'<div class="about"><h3>{title}</h3><span class="badge {look}"><span aria-hidden="true">'
        f"{STATE_ICONS[look]}</span> {t(f'export.state_{state}')}</span>"
        f'<span class="note">{escaped(" | ".join(facts))}</span></div>'
    )


def _failure(run: Run, export: Export, t: Texts) -> str:
    kind, said = export.failure
    key = kind if t.has(f"export.why_{kind}") else "other"
    if export.is_complete:
        key = "push" if kind == "explained" else key
    words = escaped(_redacted(said, run, export))
    details = (
        f'<details><summary>{t("run.details")}</summary><pre tabindex="0">{words}</pre></details>'
        if said
        else ""
    )
    return (
        f'<div class="why" role="status"><p><strong>{t(f"export.why_{key}")}</strong> '
        f"{t(f'export.todo_{key}')}</p>{details}</div>"
    )


def _error(export: Export, t: Texts) -> str:
    """Returns how far the outputs are from the model as it was trained, where that is known."""
    result = export.result
    found: Any = (result.get("quantized") or {}).get("logit_error")
    merge = result.get("merge") or {}
    if "quantized" not in result:
        found = (merge.get("logit_errors") or {}).get(merge.get("into"))
    if not isinstance(found, dict):
        return ""
    try:
        relative, same = float(found["relative"]), float(found["same_choice"])
    except (KeyError, TypeError, ValueError):
        return ""
    text = t(
        "export.error", relative=t.localized(f"{relative:.2%}"), same=t.localized(f"{same:.1%}")
    )
    return f"<p>{escaped(text)}</p>"


def _notes(run: Run, export: Export, t: Texts) -> str:
    notes = [
        t("export.note_base") if _BASE_NOTE in note else _redacted(note, run, export)
        for note in export.notes
    ]
    title = f"<strong>{t('export.note')}</strong>"
    return "".join(f'<p class="note">{title} {escaped(note)}</p>' for note in notes)


def _files(export: Export, t: Texts) -> str:
    rows = "".join(
        f"<li><code>{escaped(path)}</code> <span>{format_bytes(count, t)}</span></li>"
        for path, count in export.files[:_MAX_FILES]
    )
    rest = len(export.files) - _MAX_FILES
    return (
        f'<ul class="files">{rows}{f"<li>+ {rest}</li>" if rest > 0 else ""}</ul>' if rows else ""
    )


def _commands(run: Run, export: Export, t: Texts) -> str:
    if not export.commands:
        return ""
    rows = "".join(_copied(_redacted(command, run, export), t) for command in export.commands)
    title = t("export.commands")
    shown = " open" if export.request.format in ("vllm", "ollama") else ""
    return f"<details{shown}><summary>{title}</summary>{rows}</details>"


def _copied(command: str, t: Texts) -> str:
    words = escaped(command)
    return (
        f'<div class="command"><code tabindex="0">{words}</code><button type="button" '
        f'class="as-button" data-copies="{words}">{t("run.copy")}</button></div>'
    )


def _code(code: str, t: Texts) -> str:
    words = escaped(code)
    return (
        f"<details><summary>{t('export.code')}</summary>"
        f'<pre tabindex="0" role="region" aria-label="{t("export.code")}">{words}</pre>'
        f'<button type="button" class="as-button" data-copies="{words}">{t("run.copy")}</button>'
        "</details>"
    )


def _button(act: str, export: Export, t: Texts, name: str = "") -> str:
    whole = format_bytes(sum(count for _, count in export.files), t)
    label = t(name or f"export.{act}", size=whole)
    return (
        f'<button type="button" class="as-button {act}" data-act="{act}" '
        f'data-export="{escaped(export.name)}">{label}</button>'
    )
