"""Data step: choose, inspect and fix data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.errors import UserError
from gradio_app.guards import checked_hub_name, checked_revision, shortened
from gradio_app.pages.components import field, html, on_event
from gradio_app.pages.new import data_html, file_format, held_out, row_edit, row_search
from gradio_app.pages.new.data_check import check_data, data_path, keep_upload
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.recipe.content import MISSING, data_of, value_at, with_value
from gradio_app.recipe.edits import base_recipe, with_data
from gradio_app.recipe.hub_data import DEFAULT, known_data_sets, known_splits
from gradio_app.recipe.paths import nearest_file
from gradio_app.recipe.preview import DataReport
from gradio_app.recipe.table import Table, count_rows, first_rows
from gradio_app.redaction import UPLOAD
from gradio_app.uploads import KINDS
from lightning_peft.task_registry import Shapes, task_of_config

# Most fields that rows of any shape have.
MAX_FIELDS = 5
_DATA = "data.init_args."
_SKIPPED_ROWS = "left-out.jsonl"


def build(editor: Editor) -> None:
    """Makes the step."""
    t, settings = editor.t, editor.studio.settings
    with gr.Row(elem_id="choose-data", equal_height=True):
        most = f"{t.number(settings.limits.upload_bytes / 1e6)} MB"
        hint = t("new.data_kinds", kinds=", ".join(KINDS), most=most)
        place = field(
            gr.Dropdown,
            t,
            "new.data",
            "data-place",
            info=hint,
            choices=[],
            value=None,
            allow_custom_value=True,
            scale=3,
        )
        with gr.Column(elem_id="data-upload", scale=1, min_width=160):
            file = gr.UploadButton(t("new.upload"))
    problem = editor.problem("data-problem")
    facts = html(elem_id="data-facts")
    with gr.Accordion(t("new.data_hub"), open=False, elem_id="data-hub"):
        _build_hub(editor)

    editor.bind(file.upload, partial(_keep_upload, editor), [file], problem=problem)
    editor.bind(place.input, partial(_choose, editor), [place], problem=problem)
    editor.show([place, facts], lambda session: _updates(session, editor, hint))
    _build_report(editor)


def _keep_upload(editor: Editor, session: Session, given: Any) -> dict[str, Any]:
    upload = keep_upload(editor, session, given)
    return with_data(session.content, f"{UPLOAD}{upload.name}")


def _choose(editor: Editor, session: Session, given: Any) -> dict[str, Any]:
    text = str(given or "").strip()
    if text in ("", editor.listed_name(session, data_of(session.content))):
        # A menu sends its value once more when it loses the focus; subset and revision stay.
        return session.content
    if text == _example(session):
        content = with_data(session.content, text)
        return with_value(content, _DATA + "skip_bad_rows", MISSING)
    place = editor.places(session).data(text)
    if text.startswith(UPLOAD):
        # Its folder is the server's.
        return with_data(session.content, text)
    if "/" not in place and (near := nearest_file(editor.studio.settings.data_root, place)):
        # Data sets of the hub without a namespace look like files whose ending was left out.
        more = [UserError("checks.near", near=shortened(near))]
        raise UserError("checks.no_data", path=shortened(place), more=more)
    return with_data(session.content, place)


def _example(session: Session) -> str:
    task = task_of_config(session.content)
    return data_of(base_recipe(task.name if task else "sft"))


def _updates(session: Session, editor: Editor, hint: str) -> list[Any]:
    """Returns the data to choose from, with the one that is chosen, and what that is."""
    t, place = editor.t, data_of(session.content)
    rows = [*editor.data_choices(session), (t("new.data_example"), _example(session))]
    named = editor.listed_name(session, place)
    if named and named not in [value for _, value in rows]:
        rows.append((named, named))
    return [
        gr.update(choices=rows, value=named or None, **editor.files_hint(session, hint)),
        data_html.selected_data(place, t),
    ]


def _build_hub(editor: Editor) -> None:
    t = editor.t
    # What is on this machine is offered; on a Space, that is other visitors' business.
    menus = not editor.studio.settings.space
    typed: dict[str, Any] = {"choices": [], "value": None, "allow_custom_value": True}
    with gr.Row():
        given = [
            field(gr.Dropdown, t, key, name, **typed)
            if menus and key != "new.revision"
            else field(gr.Textbox, t, key, name, max_length=most)
            for key, name, most in (
                ("new.hub_data", "data-hub-name", 200),
                ("new.hub_config", "data-hub-config", 100),
                ("new.hub_split", "data-hub-split", 100),
                ("new.revision", "data-revision", 100),
            )
        ]
    if menus:
        name, config, split, _ = given
        editor.show([name], lambda session: [gr.update(choices=known_data_sets())])
        on_event(t, [name.input, config.input], _hub_menus, [name, config], [config, split])
    use = gr.Button(t("new.use_data"), elem_id="use-hub-data")

    def chosen(session: Session, name: Any, part: Any, rows: Any, at: Any) -> dict[str, Any]:
        place = editor.places(session).data(checked_hub_name(name))
        splits = {"train": rows.strip()} if isinstance(rows, str) and rows.strip() else None
        return with_data(
            session.content,
            place,
            hub_config=str(part).strip() if part else None,
            hub_splits=splits,
            hub_revision=checked_revision(at),
        )

    problem = editor.problem("data-hub-problem")
    editor.bind(use.click, chosen, given, problem=problem)


def _hub_menus(name: Any, config: Any) -> list[Any]:
    """Returns the configurations of a data set, and the splits of one, as far as they are known."""
    try:
        found = known_splits(checked_hub_name(name))
    except UserError:
        found = {}
    splits = found.get(str(config or DEFAULT)) or next(iter(found.values()), [])
    return [gr.update(choices=list(found)), gr.update(choices=splits)]


def _build_report(editor: Editor) -> None:
    t = editor.t
    report = html(elem_id="data-report", js_on_load=CLICK_DELEGATE)
    stop = gr.Button(t("new.stop_checking"), size="sm", visible=False, elem_id="stop-checking")
    skip = field(gr.Checkbox, t, "new.skip", "data-skip")
    with gr.Accordion(t("new.mapping"), open=False, visible=False, elem_id="mapping") as mapping:
        shape = field(gr.Radio, t, "new.shape", "mapping-shape", choices=[])
        with gr.Row(elem_id="mapping-columns"):
            columns = [
                gr.Dropdown([], label=str(place), interactive=True, elem_id=f"mapping-{place}")
                for place in range(MAX_FIELDS)
            ]
        mapped = html(elem_id="mapped-rows")
        use = gr.Button(t("new.use_mapping"), elem_id="use-mapping")
    file_format.build(editor)
    held_out.build(editor)
    row_search.build(editor)
    row_edit.build(editor)
    again = gr.Button(t("new.check_again"), size="sm", elem_id="check-again")
    skips = _DATA + "skip_bad_rows"
    editor.show([skip], lambda session: [value_at(session.content, skips, None) is not None])
    outputs = [editor.session, report, stop, mapping, shape, *columns, mapped]

    def look(session: Any, request: gr.Request) -> Iterator[list[Any]]:
        yield from _check_updates(editor, session, request)

    editor.after_change(look, [], outputs)
    editor.bind(skip.input, _skip_bad_rows, [skip])
    editor.bind_event(report.click, lambda session, _: _skip_bad_rows(session, True))
    editor.bind(use.click, _map_columns, [shape, *columns])
    shown = partial(_dropdowns, editor)
    preview = partial(_mapped_rows, editor)
    given = [editor.session, shape, *columns]
    on_event(t, [one.input for one in columns], preview, given, mapped)
    changed = on_event(t, shape.input, shown, [editor.session, shape], columns)
    on_event(t, changed.then, preview, given, mapped)

    def forget(session: Session) -> dict[str, Any]:
        session.report = None
        return session.content

    editor.bind(again.click, forget)

    def stopped(session: Any, request: gr.Request) -> None:
        editor.of(session, request).stopped = True

    on_event(t, stop.click, stopped, editor.session, None)


def _check_updates(editor: Editor, session: Any, request: gr.Request) -> Iterator[list[Any]]:
    """Yields what the step shows while the data is looked at, and then of it."""
    session, t = editor.of(session, request), editor.t
    nothing, quiet = [gr.skip()] * (6 + MAX_FIELDS), [gr.skip()] * (3 + MAX_FIELDS)
    if not data_of(session.content):
        off = gr.update(visible=False)
        yield [session, "", off, off, *[gr.skip()] * (2 + MAX_FIELDS)]
        return
    if session.report is None:
        data, read = session.content.get("data"), -1
        first, of = None, None
        for rows in check_data(editor, session):
            if session.content.get("data") != data:
                break
            if read < 0:
                yield [gr.skip(), data_html.checking(t), gr.update(visible=True), *quiet]
                first, of = _first_rows(editor, session)
            elif rows != read:
                shown = data_html.checking(t, rows, of, first, session.early_report)
                yield [gr.skip(), shown, gr.update(visible=True), *quiet]
            read = rows
        if session.report is None:
            # Other data was chosen meanwhile, and is looked at next.
            yield nothing
            return
    task = task_of_config(session.content)
    shapes = task.shapes if task else ()
    current = session.report.numbers.get("shape", {}).get("name")
    names = [(t(f"new.shape_{name}"), name) for name, _ in shapes]
    chosen = current or _likely_shape(session.report, shapes)
    mapped = session.report.numbers.get("columns") or _in_order(session.report, shapes, chosen)
    yield [
        session,
        data_html.report(session.report, t),
        gr.update(visible=False),
        gr.update(
            visible=bool(shapes and session.report.columns), open=bool(session.report.refusal)
        ),
        gr.update(choices=names, value=chosen),
        *_dropdowns(editor, session, chosen),
        data_html.mapped_rows(session.report, mapped, t),
    ]


def _first_rows(editor: Editor, session: Session) -> tuple[Table | None, int | None]:
    """Returns the first rows of a file and how many it has, as far as both are known."""
    try:
        place = data_path(editor, session)
    except UserError:
        # The report says why.
        return None, None
    return first_rows(place, session.content), count_rows(place)


def _likely_shape(report: DataReport, shapes: Shapes) -> str | None:
    """Returns the shape to begin a mapping with: that of a table has a field for each column."""
    tables = [name for name, fields in shapes if name != "messages"]
    known = tables if report.needs_column_names and len(report.columns) > 1 else []
    return next(iter([*known, *(name for name, _ in shapes)]), None)


def _in_order(report: DataReport, shapes: Shapes, shape: object) -> dict[str, str]:
    """Returns a mapping to check: unknown columns in their order."""
    fields = dict(shapes).get(str(shape), ())
    return dict(zip(fields, report.columns, strict=False)) if report.needs_column_names else {}


def _dropdowns(editor: Editor, session: Any, shape: Any) -> list[Any]:
    task = task_of_config(session.content)
    shapes = dict(task.shapes) if task else {}
    fields = shapes.get(str(shape), ())
    report = session.report or DataReport()
    mapped = value_at(session.content, _DATA + "columns", None) or {}
    found = report.numbers.get("columns") or _in_order(report, tuple(shapes.items()), shape)
    updates = []
    for place in range(MAX_FIELDS):
        if place >= len(fields):
            # Not "": a value that is none of the choices would be refused with all that is sent.
            updates.append(gr.update(visible=False, choices=[], value=None))
            continue
        name = fields[place]
        rows = [(editor.t("new.no_column"), ""), *((one, one) for one in report.columns)]
        value = mapped.get(name) or found.get(name, "")
        value = value if value in report.columns else ""
        label = editor.t(f"new.field_{name}")
        updates.append(gr.update(visible=True, label=label, choices=rows, value=value))
    return updates


def _skip_bad_rows(session: Session, on: Any) -> dict[str, Any]:
    return with_value(session.content, _DATA + "skip_bad_rows", _SKIPPED_ROWS if on else MISSING)


def _chosen_columns(session: Session, shape: Any, columns: tuple[Any, ...]) -> dict[str, str]:
    task = task_of_config(session.content)
    fields = dict(task.shapes).get(str(shape), ()) if task else ()
    known = session.report.columns if session.report else []
    return {
        name: str(column)
        for name, column in zip(fields, columns, strict=False)
        if column and column in known
    }


def _mapped_rows(editor: Editor, session: Any, shape: Any, *columns: Any) -> str:
    report = session.report or DataReport()
    return data_html.mapped_rows(report, _chosen_columns(session, shape, columns), editor.t)


def _map_columns(session: Session, shape: Any, *columns: Any) -> dict[str, Any]:
    task = task_of_config(session.content)
    chosen = _chosen_columns(session, shape, columns)
    content = session.content
    if task is not None and len(task.shapes) > 1:
        content = with_value(content, _DATA + "shape", str(shape))
    return with_value(content, _DATA + "columns", chosen or MISSING)
