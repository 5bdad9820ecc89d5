"""Method step: method, training length, memory and advanced settings."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.errors import UserError
from gradio_app.pages.components import field, html, on_event
from gradio_app.pages.error_reporting import localized_message
from gradio_app.pages.new import memory
from gradio_app.pages.new.editor import Editor, Session, draft_of
from gradio_app.pages.templating import render
from gradio_app.recipe.edits import amount_of, base_recipe, precision_of, with_amount, with_method
from gradio_app.recipe.fields import BASIC, BY_PATH, FIELDS, GROUPS, Field
from gradio_app.recipe.form import (
    applies,
    changed_paths,
    display_value,
    format_value,
    method_of,
    reset_field,
    with_typed,
)
from gradio_app.recipe.presets import AMOUNTS
from gradio_app.texts import Texts
from lightning_peft.compat.gradio import event_data

# Of the data, what says nothing of its rows.
_BATCH_FIELDS = {
    f"data.init_args.{name}"
    for name in ("batch_size", "num_workers", "length_grouping", "packing", "shuffle_seed")
}
_DECIMAL_KINDS = ("number", "batches")
# Of more changes, only the number is shown at first.
_MAX_OPEN = 3


def build(editor: Editor) -> None:
    """Makes the step."""
    t = editor.t
    methods = ("new.method_", ("lora", "qlora"))
    method = field(gr.Radio, t, "new.method", "method", methods, value="lora")
    amount = field(gr.Radio, t, "new.amount", "amount", ("new.amount_", AMOUNTS), value=None)
    made: dict[str, Any] = {}
    with gr.Row(elem_id="first-settings", elem_classes="settings"):
        for path in BASIC:
            made[path] = component(BY_PATH[path], t)
    html(f"<h3>{t('new.memory')}</h3>")
    memory.build(editor)
    html(f"<h3>{t('new.all_settings')}</h3>")
    marks = html(elem_id="changed-settings", js_on_load=CLICK_DELEGATE)
    groups: dict[str, Any] = {}
    for group in GROUPS:
        name = f"group-{group}"
        accordion = gr.Accordion(t(f"fields.group_{group}"), open=False, elem_id=name)
        with accordion as groups[group], gr.Row(elem_classes="settings"):
            for setting in FIELDS:
                if setting.group == group and setting.path not in made:
                    made[setting.path] = component(setting, t)
    editor.show([method, amount], lambda s: [method_of(s.content), amount_of(s.content)])
    editor.show(list(made.values()), lambda s: [_update(BY_PATH[path], s, t) for path in made])
    editor.show(list(groups.values()), lambda s: [_group_visibility(group, s) for group in groups])
    editor.show([marks], lambda s: [changed_html(s, t)])
    editor.bind(method.input, lambda s, name: with_method(s.content, name), [method])
    editor.bind(amount.input, lambda s, name: with_amount(s.content, name), [amount])
    editor.bind_event(marks.click, _reset)
    _bind_fields(editor, made, [amount, marks])


def component(setting: Field, t: Texts) -> Any:
    """Returns the input for a setting."""
    kind: Any = gr.Textbox
    value: Any = _localize(setting, format_value(setting.default), t)
    options: dict[str, Any] = {"max_length": 10_000, "min_width": 200}
    if setting.optional:
        options["placeholder"] = unset_text(setting, t)
    if setting.kind == "switch":
        kind, value, options = gr.Checkbox, bool(setting.default), {}
    elif setting.kind in ("choice", "several"):
        kind, value = gr.Dropdown, format_value(setting.default)
        names = [(_choice_label(one, setting, t), format_value(one)) for one in setting.choices]
        options = {"choices": names, "min_width": 200}
        if setting.kind == "several":
            kind, value = gr.CheckboxGroup, list(setting.default)
    name = f"f-{setting.key.replace('_', '-')}"
    info = hint(setting, base_recipe("sft"), t)
    return field(kind, t, f"fields.{setting.key}", name, value=value, info=info, **options)


def hint(setting: Field, content: dict[str, Any], t: Texts) -> str:
    """Returns the help of a setting; that of the precision is for the model and this machine."""
    if setting.key != "precision":
        return t(f"fields.{setting.key}_hint")
    found = precision_of(content)
    reason = t(f"fields.precision_{found.reason}")
    return t("fields.precision_hint", value=found.value, reason=reason)


def _choice_label(choice: Any, setting: Field, t: Texts) -> str:
    key = f"fields.{setting.key}_{format_value(choice) or 'null'}"
    if t.has(key):
        return t(key)
    if choice is None:
        return unset_text(setting, t)
    words = {True: "fields.yes", False: "fields.no"}
    return t(words[choice]) if isinstance(choice, bool) else format_value(choice)


def unset_text(setting: Field, t: Texts) -> str:
    """Returns the meaning of an empty setting: its default, or one of its own."""
    own = f"fields.{setting.key}_null"
    return t(own) if t.has(own) else t("fields.unset", value=t(f"fields.{setting.key}_unset"))


def _localize(setting: Field, value: Any, t: Texts) -> Any:
    """Returns the form's value of a setting, with the decimal sign of the language."""
    return (
        t.localized(value) if setting.kind in _DECIMAL_KINDS and isinstance(value, str) else value
    )


def normalize_decimal(setting: Field, value: Any, t: Texts) -> Any:
    """Returns the typed value of a setting as a recipe writes it."""
    comma = setting.kind in _DECIMAL_KINDS and isinstance(value, str) and t.language == "de"
    return value.replace(",", ".") if comma and value.count(",") == 1 else value


def _update(setting: Field, session: Session, t: Texts) -> Any:
    value, applied = (
        _localize(setting, display_value(setting, session.content), t),
        applies(setting, session.content),
    )
    return gr.update(value=value, visible=applied, **_error_props(setting, session, t))


def _group_visibility(group: str, session: Session) -> Any:
    """Shows a group that has settings for the recipe: quantization has none without QLoRA."""
    of_it = [setting for setting in FIELDS if setting.group == group and setting.path not in BASIC]
    return gr.update(visible=any(applies(setting, session.content) for setting in of_it))


def _error_props(setting: Field, session: Session, t: Texts) -> dict[str, Any]:
    """Returns the look of a setting: marked, with the reason, where its value is invalid."""
    refused = session.field_errors.get(setting.path)
    if refused is None:
        return {"info": hint(setting, session.content, t), "elem_classes": []}
    return {"info": f"\u2717 {localized_message(refused, t)}", "elem_classes": ["refused"]}


def _bind_fields(editor: Editor, made: dict[str, Any], others: list[Any]) -> None:
    """Lets every setting change the recipe, by itself: the values of others may be older."""
    for path, part in made.items():
        triggers = [part.blur, part.submit] if isinstance(part, gr.Textbox) else [part.input]
        editor.on_finish(partial(_bind_field, editor, path, part, triggers, others))


def _bind_field(
    editor: Editor, path: str, part: Any, triggers: list[Any], others: list[Any]
) -> None:
    def touched(session: Any, value: Any, request: gr.Request) -> list[Any]:
        session = editor.of(session, request)
        apply_field(session, path, normalize_decimal(BY_PATH[path], value, editor.t))
        known = [amount_of(session.content), changed_html(session, editor.t)]
        look = gr.update(**_error_props(BY_PATH[path], session, editor.t))
        return [session, draft_of(session), look, *known]

    outputs = [editor.session, editor.draft, part, *others]
    event, given = partial(gr.on, triggers), [editor.session, part]
    editor.then(on_event(editor.t, event, touched, given, outputs, trigger_mode="multiple"))


def apply_field(session: Session, path: str, typed: Any) -> None:
    """Changes a setting of a session, or remembers why what is typed cannot be one."""
    session.field_errors.pop(path, None)
    try:
        content = with_typed(session.content, BY_PATH[path], typed)
    except UserError as refused:
        session.field_errors[path] = refused
        return
    changed = content is not session.content
    if changed and path.startswith("data.") and path not in _BATCH_FIELDS:
        session.report = None
    session.content = content


def _reset(session: Session, event: gr.EventData) -> dict[str, Any]:
    path = event_data(event).get("setting")
    return reset_field(session.content, session.baseline, str(path))


def changed_html(session: Session, t: Texts) -> str:
    """Returns the settings that are not those of the recipe it was started from."""
    rows = []
    for path in changed_paths(session.content, session.baseline):
        values = (_value_text(BY_PATH[path], one, t) for one in (session.baseline, session.content))
        rows.append((path, t(f"fields.{BY_PATH[path].key}"), *values))
    problems = [
        (t(f"fields.{BY_PATH[path].key}"), localized_message(refused, t))
        for path, refused in session.field_errors.items()
    ]
    preset = amount_of(session.baseline)
    title = t("new.changed", count=len(rows))
    if preset is not None:
        title = t("new.changed_from", preset=t(f"new.amount_{preset}"), count=len(rows))
    opened = len(rows) <= _MAX_OPEN
    return render("new.changes", t, problems=problems, rows=rows, title=title, opened=opened)


def _value_text(setting: Field, content: dict[str, Any], t: Texts) -> str:
    value = _localize(setting, display_value(setting, content), t)
    if isinstance(value, bool):
        return t("fields.yes" if value else "fields.no")
    return format_value(value) or unset_text(setting, t)
