"""The step in which a model is chosen: of a list, on the hub, or in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.guards import checked_hub_name, checked_revision, inside, shortened
from gradio_app.pages.components import field, html, on_event, show_one
from gradio_app.pages.new.data_check import is_offline
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.pages.templating import render
from gradio_app.recipe.content import value_at, with_value
from gradio_app.recipe.edits import with_model
from gradio_app.recipe.model_files import (
    free_bytes,
    is_cached,
    model_info,
    model_places,
    weight_bytes,
)
from gradio_app.recipe.presets import DEMO_BASE, MODELS, Model
from gradio_app.recipe.validation import check_files
from gradio_app.runs.formatting import format_bytes
from gradio_app.texts import Texts
from lightning_peft.demo.real_base import SMOLLM2_PLACE, smollm2
from lightning_peft.task_registry import task_of_config

SOURCES = ("preset", "hub", "folder")


def build(editor: Editor) -> None:
    """Makes the step."""
    t = editor.t
    settings = editor.studio.settings
    sources = [name for name in SOURCES if name != "folder" or settings.models_root]
    if settings.limits.parameters is not None:
        sources = ["preset"]
    of, several = ("new.model_", sources), len(sources) > 1
    source = field(
        gr.Radio, t, "new.model_source", "model-source", of, value="preset", visible=several
    )
    preset = field(gr.Dropdown, t, "new.model_list", "model-preset", choices=[])
    with gr.Column(visible=False, elem_id="model-hub") as hub:
        _build_hub(editor)
    with gr.Column(visible=False, elem_id="model-folder") as folder:
        _build_folder(editor)
    facts = html(elem_id="model-facts")
    parts = [preset, hub, folder]

    def shown(session: Session) -> list[Any]:
        found = model_source(session.content)
        found = found if found in sources else "preset"
        visible = [gr.update(visible=name == found) for name in ("hub", "folder")]
        listed = gr.update(**_preset(session, editor), visible=found == "preset")
        return [found, listed, *visible, _facts(session, t)]

    editor.show([source, *parts, facts], shown)
    editor.bind(preset.input, _choose_preset, [preset])
    show_one(t, source, SOURCES, parts)


def _build_hub(editor: Editor) -> None:
    t = editor.t
    with gr.Row():
        name = field(gr.Textbox, t, "new.hub_name", "model-hub-name", max_length=200)
        revision = field(gr.Textbox, t, "new.revision", "model-revision", max_length=100)
    trust: Any = gr.State(False)
    confirmed: Any = gr.State("")
    if not editor.studio.settings.space:
        trust = field(gr.Checkbox, t, "new.trust", "model-trust", value=False)
        confirmed = field(gr.Textbox, t, "new.trust_confirm", "trust-confirm", visible=False)
        on_event(t, trust.input, lambda on: gr.update(visible=bool(on)), trust, confirmed)
    use = gr.Button(t("new.use_model"), elem_id="use-model")

    def chosen(session: Session, given: Any, at: Any, code: Any, again: Any) -> dict[str, Any]:
        repository, colon, file = str(given or "").strip().partition(":")
        hub_name = checked_hub_name(repository) + colon + file
        at = checked_revision(at, commit=code is True)
        place = editor.places(session).model(hub_name)
        check_files(place, at, trusted=code is True)
        content = with_model(session.content, place, at)
        if code is True:
            if editor.studio.settings.space:
                raise UserError("checks.remote_here")
            if again != hub_name:
                raise UserError("checks.remote_confirm", name=hub_name)
            content = with_value(content, "model.init_args.trust_remote_code", True)
        return content

    editor.bind(use.click, chosen, [name, revision, trust, confirmed])


def _build_folder(editor: Editor) -> None:
    t, root = editor.t, editor.studio.settings.models_root
    if root is None:
        return
    none = html(f"<p class='note'>{t('new.no_folders')}</p>")
    folder = field(gr.Dropdown, t, "new.folder", "model-folder-name", choices=[], value=None)

    def shown(session: Session) -> list[Any]:
        # Looked up each time: folders come and go while the page is open.
        folders, name = model_places(root), None
        chosen = value_at(session.content, "model.init_args.model", None)
        if isinstance(chosen, str) and Path(chosen).is_absolute():
            name = next((one for one in folders if (root / one).resolve() == Path(chosen)), None)
        there = bool(folders)
        choices = gr.update(choices=folders, value=name, visible=there)
        return [gr.update(visible=not there), choices]

    def chosen(session: Session, name: Any) -> dict[str, Any]:
        if name not in model_places(root):
            raise UserError("checks.no_model", path=shortened(name))
        place = inside(root, str(name))
        check_files(place.as_posix(), None, trusted=False)
        return with_model(session.content, place.as_posix(), None)

    editor.show([none, folder], shown)
    editor.bind(folder.input, chosen, [folder])


def available_models(session: Session, editor: Editor) -> list[Model]:
    """Returns the models that are offered for the task of a recipe."""
    task = task_of_config(session.content)
    most = editor.studio.settings.limits.parameters
    return [
        model
        for model in MODELS
        if task is not None
        and task.family in model.families
        and (most is None or model.parameters <= most)
        and (model.name != SMOLLM2_PLACE or is_cached(model.name))
    ]


def _choose_preset(session: Session, name: Any) -> dict[str, Any]:
    if not any(model.name == name for model in MODELS):
        raise UserError("checks.no_model", path=str(name)[:60])
    return with_model(session.content, name, None)


def model_source(content: dict[str, Any]) -> str:
    """Returns where the model of a recipe is from: one of :data:`SOURCES`."""
    model = value_at(content, "model.init_args.model", None)
    listed = model is None or any(one.name == model for one in MODELS)
    if listed or value_at(content, "model.init_args.config", None) is not None:
        return "preset"
    return "folder" if Path(str(model)).is_absolute() else "hub"


def _preset(session: Session, editor: Editor) -> dict[str, Any]:
    models = available_models(session, editor)
    current = value_at(session.content, "model.init_args.model", None)
    drawn = value_at(session.content, "model.init_args.config", None) is not None
    rows = [(_model_label(model, editor.t), model.name) for model in models]
    known = current if not drawn and current in [model.name for model in models] else None
    return {"choices": rows, "value": known}


def _model_label(model: Model, t: Texts) -> str:
    title = t("new.demo_base") if model.name == DEMO_BASE else model.title
    row = t(
        "new.model_row",
        title=title,
        weights=format_parameters(model.parameters),
        licence=model.licence,
    )
    if model.name != DEMO_BASE:
        fetched = t("new.not_here", size=format_bytes(model.download_bytes, t))
        absent = t("new.not_offline") if is_offline() else fetched
        row += ", " + (t("new.here") if is_cached(model.name) else absent)
    return row


def format_parameters(number: int) -> str:
    """Returns a number of weights as people say it."""
    if number >= 999_500_000:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.0f} M"


def _facts(session: Session, t: Texts) -> str:
    name = value_at(session.content, "model.init_args.model", None)
    lines = []
    if value_at(session.content, "model.init_args.config", None) is not None:
        lines.append(t("new.model_random"))
    elif name is None:
        lines.append(t("new.model_none"))
    else:
        model = next((one for one in MODELS if one.name == name), None)
        shown = t("new.demo_base") if name == DEMO_BASE else model.title if model else name
        lines.append(t("new.model_chosen", name=shown))
        if model is not None:
            lines.append(t("new.model_weighs", size=format_bytes(model.weight_bytes, t)))
        if name == DEMO_BASE:
            lines.append(t("new.demo_about"))
        elif Path(name).is_absolute():
            if Path(name).exists():
                lines.append(_model_summary(Path(name), t))
            lines.append(t("new.model_files", size=format_bytes(weight_bytes(Path(name)), t)))
        elif is_cached(name):
            file = smollm2() if name == SMOLLM2_PLACE else None
            lines += [_model_summary(file, t)] if file is not None else []
            lines.append(t("new.model_here"))
        else:
            lines.append(t("new.model_fetched"))
            lines += _download_notes(model, t)
        if model is not None and model.gated:
            lines.append(t("new.model_gated"))
        if value_at(session.content, "model.init_args.trust_remote_code", None):
            revision = value_at(session.content, "model.init_args.revision", "")
            lines.append(t("new.model_trusted", commit=revision))
    return render("new.chosen_model", t, lines=lines, offline=is_offline())


def _model_summary(folder: Path, t: Texts) -> str:
    """Returns the properties of a model in a folder, or in a GGUF file, as a sentence."""
    found = model_info(folder)
    words = []
    if found.parameters:
        words.append(
            t("new.about_parameters", count=t.localized(format_parameters(found.parameters)))
        )
    words += filter(None, [found.architecture])
    if found.context:
        words.append(t("new.about_context", tokens=t.number(found.context)))
    words += filter(None, [found.dtype])
    words.append(t("new.about_chats" if found.has_chat_template else "new.about_no_template"))
    return ", ".join(words) + "."


def _download_notes(model: Model | None, t: Texts) -> list[str]:
    """Returns how much is fetched for a model, as far as that is known, and how much room is."""
    free = free_bytes()
    if model is None:
        return [t("new.download_unknown", free=format_bytes(free, t))]
    key = "new.download_fits" if model.download_bytes < free else "new.download_no_room"
    return [t(key, size=format_bytes(model.download_bytes, t), free=format_bytes(free, t))]
