"""Model step: from the list, a local folder or the hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.guards import checked_hub_name, checked_revision, inside, shortened
from gradio_app.pages.components import field, html, on_event
from gradio_app.pages.new.data_check import is_offline, is_unavailable
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
from gradio_app.recipe.preview import local_path
from gradio_app.recipe.validation import check_files
from gradio_app.runs.formatting import format_bytes
from gradio_app.texts import Texts
from lightning_peft.demo.real_base import SMOLLM2_PLACE, smollm2
from lightning_peft.task_registry import task_of_config


def build(editor: Editor) -> None:
    """Makes the step."""
    t, open_to_all = editor.t, editor.studio.settings.limits.parameters is None
    choice = field(
        gr.Dropdown,
        t,
        "new.model_list",
        "model-choice",
        choices=[],
        value=None,
        allow_custom_value=open_to_all,
    )
    problem = editor.problem("model-problem")
    facts = html(elem_id="model-facts")
    if open_to_all:
        with gr.Accordion(t("new.model_hub"), open=False, elem_id="model-hub"):
            _build_hub(editor)
    editor.show([choice], lambda session: [_choices(session, editor)])
    editor.show([facts], lambda session: [_facts(session, editor)])
    editor.bind(choice.input, partial(_choose, editor), [choice], problem=problem)


def _build_hub(editor: Editor) -> None:
    t = editor.t
    with gr.Row():
        name = field(gr.Textbox, t, "new.hub_name", "model-hub-name", max_length=200)
        revision = field(gr.Textbox, t, "new.revision", "model-revision", max_length=100)
    trust: Any = gr.State(False)
    confirmed: Any = gr.State("")
    if not editor.studio.settings.space:
        options: Any = {"value": False, "elem_classes": "warns"}
        trust = field(gr.Checkbox, t, "new.trust", "model-trust", **options)
        confirmed = field(gr.Textbox, t, "new.trust_confirm", "trust-confirm", visible=False)
        on_event(t, trust.input, lambda on: gr.update(visible=bool(on)), trust, confirmed)
    use = gr.Button(t("new.use_model"), elem_id="use-model")

    def chosen(session: Session, given: Any, at: Any, code: Any, again: Any) -> dict[str, Any]:
        content, hub_name = _from_hub(editor, session, given, at, code is True)
        if code is True:
            if editor.studio.settings.space:
                raise UserError("checks.remote_here")
            if again != hub_name:
                raise UserError("checks.remote_confirm", name=hub_name)
            content = with_value(content, "model.init_args.trust_remote_code", True)
        return content

    editor.bind(use.click, chosen, [name, revision, trust, confirmed])


def _from_hub(
    editor: Editor, session: Session, given: Any, at: Any = None, code: bool = False
) -> tuple[dict[str, Any], str]:
    """Returns the recipe for a model of the hub, and its checked name."""
    repository, colon, file = str(given or "").strip().partition(":")
    hub_name = checked_hub_name(repository) + colon + file
    revision = checked_revision(at, commit=code)
    place = editor.places(session).model(hub_name)
    check_files(place, revision, trusted=code)
    _require_available(place)
    return with_model(session.content, place, revision), hub_name


def _choose(editor: Editor, session: Session, given: Any) -> dict[str, Any]:
    root = editor.studio.settings.models_root
    name = str(given or "").strip()
    if name in ("", _shown_model(session, root)):
        # A menu sends its value once more when it loses the focus; the revision stays.
        return session.content
    if root is not None and name in model_places(root):
        place = inside(root, name).as_posix()
        check_files(place, None, trusted=False)
        return with_model(session.content, place, None)
    if any(model.name == name for model in MODELS):
        _require_available(name)
        return with_model(session.content, name, None)
    if editor.studio.settings.limits.parameters is not None:
        raise UserError("checks.no_model", path=shortened(name))
    return _from_hub(editor, session, name)[0]


def _require_available(name: str) -> None:
    """Raises UserError for a model that would have to be fetched where nothing is."""
    if is_unavailable(name):
        raise UserError("new.model_away", name=shortened(name))


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


def _choices(session: Session, editor: Editor) -> Any:
    """Returns the models to choose from: in folders here, and of the list."""
    t, root = editor.t, editor.studio.settings.models_root
    # Looked up each time: folders come and go while the page is open.
    folders = model_places(root) if root is not None else []
    rows = [(t("new.model_in_folder", name=name), name) for name in folders]
    listed = [model for model in available_models(session, editor) if model.name not in folders]
    listed.sort(key=lambda model: is_unavailable(model.name))
    rows += [(_model_label(model, t), model.name) for model in listed]
    current = _shown_model(session, root)
    if current is not None and current not in [value for _, value in rows]:
        rows.append((current, current))
    return gr.update(choices=rows, value=current)


def _shown_model(session: Session, root: Path | None) -> str | None:
    """Returns the model of a recipe as the menu shows it; ``None`` for none and a random one."""
    current = value_at(session.content, "model.init_args.model", None)
    if current is None or value_at(session.content, "model.init_args.config", None) is not None:
        return None
    if root is not None and Path(str(current)).is_absolute():
        here = (name for name in model_places(root) if (root / name).resolve() == Path(current))
        current = next(here, current)
    return str(current)


def _model_label(model: Model, t: Texts) -> str:
    title = t("new.demo_base") if model.name == DEMO_BASE else model.title
    row = t(
        "new.model_row",
        title=title,
        weights=format_parameters(model.parameters),
        licence=model.licence,
    )
    if is_unavailable(model.name):
        # The rows that begin so are greyed in `new.css`.
        return f"\u2717 {row}, {t('new.not_offline')}"
    more = [t("new.gated")] if model.gated else []
    if model.memory is not None:
        lora, qlora = (format_bytes(1e9 * need, t) for need in model.memory)
        more.append(t("new.model_memory", lora=lora, qlora=qlora))
    if model.name != DEMO_BASE:
        fetched = t("new.not_here", size=format_bytes(model.download_bytes, t))
        more.append(t("new.here") if is_cached(model.name) else fetched)
    return ", ".join([row, *more])


def format_parameters(number: int) -> str:
    """Returns a number of weights as people say it."""
    if number >= 999_500_000:
        return f"{number / 1e9:.1f} B"
    return f"{number / 1e6:.0f} M"


def _facts(session: Session, editor: Editor) -> str:
    t, name = editor.t, value_at(session.content, "model.init_args.model", None)
    lines = []
    if value_at(session.content, "model.init_args.config", None) is not None:
        lines.append(t("new.model_random"))
    elif name is None:
        lines.append(t("new.model_none"))
    else:
        model = next((one for one in MODELS if one.name == name), None)
        shown = Path(name).name if Path(name).is_absolute() else name
        shown = t("new.demo_base") if name == DEMO_BASE else model.title if model else shown
        lines.append(t("new.model_chosen", name=shown))
        if model is not None:
            lines.append(t("new.model_weighs", size=format_bytes(model.weight_bytes, t)))
        if name == DEMO_BASE:
            lines.append(t("new.demo_about"))
        elif Path(name).is_absolute():
            lines += _file_facts(name, session, editor)
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


def _file_facts(name: str, session: Session, editor: Editor) -> list[str]:
    """Returns properties of a model by its files; none of a path that its owner may not read."""
    try:
        place = local_path(editor.places(session).model(name))
    except UserError:
        return []
    about = [_model_summary(place, editor.t)] if place.exists() else []
    return [*about, editor.t("new.model_files", size=format_bytes(weight_bytes(place), editor.t))]


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
