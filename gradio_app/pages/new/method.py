"""The step for method, amount of training, memory, and every other setting."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.errors import UserError
from gradio_app.guards import escaped
from gradio_app.pages.error_reporting import localized_message, report_errors
from gradio_app.pages.layout import event_options
from gradio_app.pages.new import memory
from gradio_app.pages.new.editor import Editor, Session, draft_of
from gradio_app.recipe.content import with_value
from gradio_app.recipe.edits import (
    amount_of,
    base_recipe,
    precision_of,
    with_amount,
    with_method,
)
from gradio_app.recipe.fields import BASIC, BY_PATH, FIELDS, GROUPS, Field
from gradio_app.recipe.form import (
    applies,
    changed_paths,
    display_value,
    format_value,
    method_of,
    parse_value,
    reset_field,
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
    method = gr.Radio(
        [(t(f"new.method_{name}"), name) for name in ("lora", "qlora")],
        value="lora",
        label=t("new.method"),
        info=t("new.method_hint"),
        interactive=True,
        elem_id="method",
    )
    amount = gr.Radio(
        [(t(f"new.amount_{name}"), name) for name in AMOUNTS],
        value=None,
        label=t("new.amount"),
        info=t("new.amount_hint"),
        interactive=True,
        elem_id="amount",
    )
    made: dict[str, Any] = {}
    with gr.Row(elem_id="first-settings", elem_classes="settings"):
        for path in BASIC:
            made[path] = component(BY_PATH[path], t)
    gr.HTML(f"<h3>{escaped(t('new.memory'))}</h3>", padding=False)
    memory.build(editor)
    gr.HTML(f"<h3>{escaped(t('new.all_settings'))}</h3>", padding=False)
    marks = gr.HTML("", elem_id="changed-settings", padding=False, js_on_load=CLICK_DELEGATE)
    groups: dict[str, Any] = {}
    for group in GROUPS:
        with (
            gr.Accordion(
                t(f"fields.group_{group}"), open=False, elem_id=f"group-{group}"
            ) as groups[group],
            gr.Row(elem_classes="settings"),
        ):
            for field in FIELDS:
                if field.group == group and field.path not in made:
                    made[field.path] = component(field, t)
    editor.show([method, amount], lambda s: [method_of(s.content), amount_of(s.content)])
    editor.show(list(made.values()), lambda s: [_update(BY_PATH[path], s, t) for path in made])
    editor.show(list(groups.values()), lambda s: [_group_visibility(group, s) for group in groups])
    editor.show([marks], lambda s: [changed_html(s, t)])
    editor.bind(method.input, lambda s, name: with_method(s.content, name), [method])
    editor.bind(amount.input, lambda s, name: with_amount(s.content, name), [amount])
    editor.bind_event(marks.click, _reset)
    _bind_fields(editor, made, [amount, marks])


def component(field: Field, t: Texts) -> Any:
    """Returns the input for a setting."""
    options: dict[str, Any] = {
        "label": t(f"fields.{field.key}"),
        "info": hint(field, base_recipe("sft"), t),
        "interactive": True,
        "elem_id": f"f-{field.key.replace('_', '-')}",
    }
    if field.kind == "switch":
        return gr.Checkbox(value=bool(field.default), **options)
    if field.kind == "choice":
        names = [
            (_choice_label(choice, field, t), format_value(choice)) for choice in field.choices
        ]
        return gr.Dropdown(names, value=format_value(field.default), min_width=200, **options)
    placeholder = unset_text(field, t) if field.optional else ""
    return gr.Textbox(
        _localize(field, format_value(field.default), t),
        max_length=10_000,
        placeholder=placeholder,
        min_width=200,
        **options,
    )


def hint(field: Field, content: dict[str, Any], t: Texts) -> str:
    """Returns the help of a setting; that of the precision is for the model and this machine."""
    if field.key != "precision":
        return t(f"fields.{field.key}_hint")
    found = precision_of(content)
    reason = t(f"fields.precision_{found.reason}")
    return t("fields.precision_hint", value=found.value, reason=reason)


def _choice_label(choice: Any, field: Field, t: Texts) -> str:
    key = f"fields.{field.key}_{format_value(choice) or 'null'}"
    if t.has(key):
        return t(key)
    if choice is None:
        return unset_text(field, t)
    words = {True: "fields.yes", False: "fields.no"}
    return t(words[choice]) if isinstance(choice, bool) else format_value(choice)


def unset_text(field: Field, t: Texts) -> str:
    """Returns the default text of a setting."""
    return t("fields.unset", value=t(f"fields.{field.key}_unset"))


def _localize(field: Field, value: Any, t: Texts) -> Any:
    """Returns the form's value of a setting, with the decimal sign of the language."""
    return t.localized(value) if field.kind in _DECIMAL_KINDS and isinstance(value, str) else value


def normalize_decimal(field: Field, value: Any, t: Texts) -> Any:
    """Returns the typed value of a setting as a recipe writes it."""
    comma = field.kind in _DECIMAL_KINDS and isinstance(value, str) and t.language == "de"
    return value.replace(",", ".") if comma and value.count(",") == 1 else value


def _update(field: Field, session: Session, t: Texts) -> Any:
    value, applied = (
        _localize(field, display_value(field, session.content), t),
        applies(field, session.content),
    )
    return gr.update(value=value, visible=applied, **_error_props(field, session, t))


def _group_visibility(group: str, session: Session) -> Any:
    """Shows a group that has settings for the recipe: quantization has none without QLoRA."""
    of_it = [field for field in FIELDS if field.group == group and field.path not in BASIC]
    return gr.update(visible=any(applies(field, session.content) for field in of_it))


def error_update(field: Field, session: Session, t: Texts) -> Any:
    """Returns the look of a setting: marked, with the reason, where its value is invalid."""
    return gr.update(**_error_props(field, session, t))


def _error_props(field: Field, session: Session, t: Texts) -> dict[str, Any]:
    refused = session.field_errors.get(field.path)
    if refused is None:
        return {"info": hint(field, session.content, t), "elem_classes": []}
    return {"info": f"\u2717 {localized_message(refused, t)}", "elem_classes": ["refused"]}


def _bind_fields(editor: Editor, made: dict[str, Any], others: list[Any]) -> None:
    """Lets every setting change the recipe, by itself: the values of others may be older."""
    for path, part in made.items():
        triggers = [part.blur, part.submit] if isinstance(part, gr.Textbox) else [part.input]
        editor.on_finish(partial(_bind_field, editor, path, part, triggers, others))


def _bind_field(
    editor: Editor, path: str, part: Any, triggers: list[Any], others: list[Any]
) -> None:
    @report_errors(editor.t)
    def touched(session: Any, value: Any, request: gr.Request) -> list[Any]:
        session = editor.of(session, request)
        apply_field(session, path, normalize_decimal(BY_PATH[path], value, editor.t))
        known = [amount_of(session.content), changed_html(session, editor.t)]
        return [session, draft_of(session), error_update(BY_PATH[path], session, editor.t), *known]

    outputs = [editor.session, editor.draft, part, *others]
    options = {"trigger_mode": "multiple", **event_options()}
    editor.then(gr.on(triggers, touched, [editor.session, part], outputs, **options))


def apply_field(session: Session, path: str, typed: Any) -> None:
    """Changes a setting of a session, or remembers why what is typed cannot be one."""
    field = BY_PATH[path]
    session.field_errors.pop(path, None)
    if not applies(field, session.content) or typed == display_value(field, session.content):
        return
    try:
        value = parse_value(field, typed)
    except UserError as refused:
        session.field_errors[path] = refused
        return
    if path.startswith("data.") and path not in _BATCH_FIELDS:
        session.report = None
    session.content = with_value(session.content, path, value)


def _reset(session: Session, event: gr.EventData) -> dict[str, Any]:
    path = event_data(event).get("setting")
    return reset_field(session.content, session.baseline, str(path))


def changed_html(session: Session, t: Texts) -> str:
    """Returns the settings that are not those of the recipe it was started from."""
    rows = ""
    for path in changed_paths(session.content, session.baseline):
        field = BY_PATH[path]
        label = t(f"fields.{field.key}")
        before, now = (_value_text(field, one, t) for one in (session.baseline, session.content))
        rows += (
            f"<li><span>{escaped(t('new.was', label=label, before=before, now=now))}</span> "
            f'<button type="button" class="as-button small" data-act="reset" '
            f'data-setting="{escaped(path)}" '
            f'aria-label="{escaped(t("new.reset_named", label=label))}">{escaped(t("new.reset"))}'
            "</button></li>"
        )
    problems = "".join(
        f"<li>{escaped(t(f'fields.{BY_PATH[path].key}'))}: "
        f"{escaped(localized_message(refused, t))}</li>"
        for path, refused in session.field_errors.items()
    )
    alert = f'<div class="failure" role="alert"><ul>{problems}</ul></div>' if problems else ""
    if not rows:
        return f'{alert}<p class="note">{escaped(t("new.nothing_changed"))}</p>'
    preset = amount_of(session.baseline)
    count = rows.count("<li>")
    said = t("new.changed", count=count)
    if preset is not None:
        said = t(
            "new.changed_from", preset=t(f"new.amount_{preset}").partition(":")[0], count=count
        )
    opened = " open" if count <= _MAX_OPEN else ""
    return (
        f'{alert}<details class="changes"{opened}><summary>{escaped(said)}</summary>'
        f'<ul class="changed">{rows}</ul></details>'
    )


def _value_text(field: Field, content: dict[str, Any], t: Texts) -> str:
    value = _localize(field, display_value(field, content), t)
    if isinstance(value, bool):
        return t("fields.yes" if value else "fields.no")
    return str(value) or unset_text(field, t)
