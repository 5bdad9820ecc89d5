"""Data check of a page: cached per data source, incremental, cancellable."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gradio_app.errors import UserError
from gradio_app.guards import shortened
from gradio_app.pages.error_reporting import as_gradio_error, localized_message
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.recipe.answer_cache import file_stamps
from gradio_app.recipe.content import data_of, value_at, with_value
from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.model_files import is_cached
from gradio_app.recipe.preview import DataReport, local_path, preview_data
from gradio_app.recipe.validation import validate_content, with_revision
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.redaction import bundled_folders
from gradio_app.uploads import Upload, Uploads
from lightning_peft.task_registry import task_of_config

_POLL_SECONDS = 0.5
# Of a file of more bytes, so many rows are looked at and shown before all of them.
_LARGE_BYTES, EARLY_ROWS = 2_000_000, 1_000
# What else a report depends on besides the settings of the data.
_PLACES = ("data", "validation_data", "test_data", "tokenizer", "processor", "feature_extractor")


def is_offline() -> bool:
    """Returns whether nothing is fetched from the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def is_unavailable(name: str, weights: bool = True) -> bool:
    """Whether a model would have to be fetched from the hub, and cannot be."""
    fetched = not os.path.isabs(name) and (":" not in name or name.endswith(".gguf"))
    return fetched and is_offline() and not is_cached(name, weights)


def unavailable_model(content: dict[str, Any]) -> str:
    """Returns the model of a recipe if it would have to be fetched and cannot be; else nothing."""
    task = task_of_config(content)
    names = {value_at(content, "model.init_args.model", None): True}
    if task is not None and task.processor_argument is not None:
        processor = value_at(content, f"data.init_args.{task.processor_argument}", None)
        names.setdefault(processor, False)
    named = [name for name in names if isinstance(name, str)]
    return next((name for name in named if is_unavailable(name, names[name])), "")


def require_report(editor: Editor, session: Session) -> DataReport:
    """Returns the data report of a session, checked now if necessary.

    Raises UserError if no data is chosen.
    """
    while session.report is None:
        if not data_of(session.content):
            raise UserError("checks.no_rows")
        for _ in check_data(editor, session):
            pass
    found: DataReport = session.report
    return found


def check_data(editor: Editor, session: Session) -> Iterator[int]:
    """Looks at the data of a session; yields how many rows have been read, again and again.

    Afterwards its report is set, unless other data was chosen meanwhile. Data that is being looked
    at already is not looked at twice.
    """
    data = _data_section(session)
    while session.checking == data and session.report is None and _data_section(session) == data:
        yield session.rows_read
        time.sleep(_POLL_SECONDS)
    if session.report is not None or _data_section(session) != data:
        return
    session.checking, session.stopped, session.rows_read = data, False, 0
    session.early_report = None
    found: list[DataReport] = []
    thread = threading.Thread(target=lambda: found.append(_check(editor, session, data)))
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            yield session.rows_read
    finally:
        if session.checking is data:
            session.checking = None
            if found and _data_section(session) == data and not found[0].cancelled:
                session.report = found[0]
            elif session.stopped:
                session.report = DataReport(refusal=editor.t("new.check_stopped"))


def _check(editor: Editor, session: Session, data: Any) -> DataReport:
    settings, t = editor.studio.settings, editor.t

    def still_needed() -> bool:
        return session.checking is data and not session.stopped and _data_section(session) == data

    def on_rows(rows: int) -> None:
        session.rows_read = rows

    missing = unavailable_model(session.content)
    if missing:
        return DataReport(refusal=t("new.model_away", name=missing), step="model")
    try:
        content = {**base_recipe("sft"), "data": data}
        content = validate_content(content, settings, session.owner)

        def find(needed: Callable[[], bool]) -> DataReport:
            given = (editor.studio.worker, settings.space, needed, on_rows)
            if _is_large(content):
                first = with_value(content, "data.init_args.limit", EARLY_ROWS)
                session.early_report = preview_data(first, *given)
            return preview_data(content, *given)

        if not is_bundled(content):
            return find(still_needed)
        stamps = [file_stamps(local_path(place)) for place in _places(content)]
        question = ("preview", dump_yaml(content["data"]), stamps)
        return editor.studio.answers.ask(question, find, lambda one: one.ok, still_needed)
    except UserError as refused:
        return DataReport(refusal=localized_message(refused, t))
    except Exception as error:
        return DataReport(refusal=str(as_gradio_error(error, t).message))


def is_bundled(content: dict[str, Any]) -> bool:
    """Whether the data of a checked recipe comes with the package, so that all pages share it."""
    marks = tuple(bundled_folders())
    return bool(data_of(content)) and all(one.startswith(marks) for one in _places(content))


def _places(content: dict[str, Any]) -> list[str]:
    found = [value_at(content, f"data.init_args.{key}", None) for key in _PLACES]
    return [str(place) for place in found if place is not None]


def data_path(editor: Editor, session: Session) -> Path:
    """Returns where the rows of a session lie, if that is on this machine.

    The recipe may not have been checked: raises UserError for what its owner may not read.
    """
    place = data_of(session.content)
    if not place:
        raise UserError("checks.no_rows")
    return local_path(editor.places(session).data(place))


def recipes_in_use(editor: Editor, session: Session) -> str:
    """Returns a visitor's recipes: of runs, also deleted ones, to undo a change, and to reset."""
    try:
        of_runs = editor.studio.store.recipes(session.owner)
    except OSError:
        # Any upload may be in use.
        uploads = Uploads(editor.studio.settings, session.owner).list()
        of_runs = "\n".join(one.name for one in uploads)
    return f"{session.undo}\n{session.baseline}\n{of_runs}"


def keep_upload(
    editor: Editor, session: Session, file: object, replaced: Path | None = None
) -> Upload:
    """Keeps a file in the place of another, or of the oldest one in no recipe if there are many.

    Raises UserError as :meth:`Uploads.save` does, and keeps the other one then.
    """
    uploads, day = Uploads(editor.studio.settings, session.owner), time.strftime("%Y%m%d")
    try:
        upload = uploads.save(file, day)
    except UserError as refused:
        if refused.key != "checks.upload_many":
            raise
        if replaced is not None:
            replaced.unlink()
        else:
            recipes = f"{session.content}\n{recipes_in_use(editor, session)}"
            dropped = uploads.drop_oldest(recipes)
            session.notice = editor.t("new.upload_dropped", name=shortened(dropped.title))
        upload = uploads.save(file, day)
    if replaced is not None:
        replaced.unlink(missing_ok=True)
    return upload


def _is_large(content: dict[str, Any]) -> bool:
    path = local_path(data_of(content))
    unlimited = value_at(content, "data.init_args.limit", None) is None
    return unlimited and path.is_file() and path.stat().st_size > _LARGE_BYTES


def _data_section(session: Session) -> Any:
    return with_revision(session.content).get("data")
