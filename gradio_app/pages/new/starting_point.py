"""Starting point of a recipe: a task, a packaged recipe, a file or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.errors import UserError
from gradio_app.guards import escaped, shortened
from gradio_app.pages.components import field, html, on_load
from gradio_app.pages.error_reporting import localized_message
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.pages.templating import message, render
from gradio_app.recipe.content import MISSING, value_at, with_value
from gradio_app.recipe.edits import first_recipe, load_recipe, recipe_of_run, with_method, with_task
from gradio_app.recipe.validation import validate_content
from gradio_app.recipe.yaml_text import MAX_CHARACTERS, parse_yaml
from gradio_app.runs.store import next_name
from gradio_app.texts import Texts
from lightning_peft.recipe_files import recipe_files
from lightning_peft.task_registry import TASKS, task_of_config

_CLEAR_QUERY = """() => {
  const address = new URL(window.location.href);
  for (const name of ['from', 'recipe', 'method']) address.searchParams.delete(name);
  window.history.replaceState(window.history.state, '', address);
}"""
_SOLVABLE = {"checks.no_data", "checks.no_paths", "checks.no_model", "checks.no_rows"}


def build(editor: Editor) -> None:
    """Makes the part, and what happens when the page is opened."""
    t = editor.t
    notice = html(elem_id="new-notice")
    task = field(gr.Dropdown, t, "new.task", "new-task", ("new.task_", TASKS), value="sft")
    recipes = [(f"{name}: {_recipe_summary(name)}", name) for name in recipe_files()]
    with gr.Accordion(t("new.start_from"), open=False, elem_id="new-start-from"):
        named = field(gr.Dropdown, t, "new.recipe", "new-recipe", choices=recipes, value=None)
        label, types = t("new.recipe_file"), [".yaml", ".yml"]
        file = gr.File(label=label, file_types=types, height=120, elem_id="new-recipe-file")
    undo = html(elem_id="task-undo", js_on_load=CLICK_DELEGATE)
    editor.show([task, notice, undo], lambda session: _updates(session, t))
    editor.bind_event(undo.click, _undo_task_change)
    editor.bind(task.input, _change_task, [task])
    editor.bind(named.input, _load_named, [named])

    def read(session: Session, given: Any) -> dict[str, Any]:
        session.baseline = validate_pasted(editor, session, read_recipe_file(given))
        return session.baseline

    editor.bind(file.upload, read, [file])


def bind_page_load(editor: Editor) -> None:
    """Fills the page when it is opened: from its address, from the draft, or from the start."""

    def load(draft: Any, request: gr.Request) -> list[Any]:
        first = first_recipe()
        session = editor.of(Session(first, first, opened=True), request)
        try:
            session.content = session.baseline = _requested_recipe(editor, session, draft, request)
            since = draft.get("since") if session.from_draft else None
            if since:
                session.baseline = require_known_task(parse_yaml(since))
        except UserError as refused:
            session.notice = localized_message(refused, editor.t)
        editor.studio.worker.start()
        return editor.updates(session)

    loaded = on_load(load, editor.draft, editor.outputs)
    # From now on the draft counts: opened again, the address would take all changes back.
    loaded.then(None, None, None, js=_CLEAR_QUERY)
    editor.then(loaded)


def _requested_recipe(
    editor: Editor, session: Session, draft: Any, request: gr.Request
) -> dict[str, Any]:
    asked = dict(request.query_params)
    if asked.get("from"):
        run = editor.studio.store.get(session.owner, asked["from"])
        content = recipe_of_run(parse_yaml(run.recipe_text), editor.studio.settings)
        names = {other.name for other in editor.studio.store.list(session.owner)}
        session.copied_from, session.suggested_name = run.name, next_name(run.name, names)
        return require_known_task(content)
    if asked.get("recipe"):
        content = load_recipe(asked["recipe"])
    elif asked.get("method"):
        return with_method(first_recipe(), asked["method"])
    elif isinstance(draft, dict) and draft.get("recipe"):
        content, session.from_draft = parse_yaml(draft["recipe"]), True
    else:
        return session.content
    return require_known_task(content)


def copied_from(session: Session, t: Texts) -> str:
    """Returns of which run the recipe is a copy."""
    name = session.copied_from
    return message("copied", t("new.copy_of", name=name), t) if name else ""


def require_known_task(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe that the form can show.

    Raises UserError if it is for no task of this page.
    """
    if task_of_config(content) is None:
        raise UserError("checks.no_task")
    return content


def validate_pasted(editor: Editor, session: Session, content: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe that somebody wrote, checked but for the presence of its data.

    Raises UserError with all that is wrong with it.
    """
    try:
        validate_content(content, editor.studio.settings, session.owner)
    except UserError as refused:
        # What the steps of the form can solve may be wrong.
        if not all(one.reasons & _SOLVABLE for one in refused.problems):
            raise
    return _without_remote_code(editor, session, require_known_task(content))


def _without_remote_code(
    editor: Editor, session: Session, content: dict[str, Any]
) -> dict[str, Any]:
    """Returns a recipe without leave to run code that was not given on this page."""
    names = [f"model.init_args.{name}" for name in ("model", "revision", "trust_remote_code")]
    wanted = [value_at(content, name, None) for name in names]
    if not wanted[-1] or wanted == [value_at(session.content, name, None) for name in names]:
        return content
    # Next to the page: whoever edits the text does not see the step of the model.
    text = editor.t("checks.code_left_out", name=shortened(wanted[0]))
    gr.Warning(escaped(text), title=editor.t("frame.refused"), duration=None)
    return with_value(content, names[-1], MISSING)


def _updates(session: Session, t: Texts) -> list[Any]:
    task, text = task_of_config(session.content), session.notice
    session.notice = ""
    notice = render("new.alert", t, text=text) if text else ""
    return [task.name if task else None, notice, _undo_html(session, t)]


def _undo_html(session: Session, t: Texts) -> str:
    """Returns the settings that a change of the task has kept, with the undo button."""
    if session.undo is None:
        return ""
    before = session.undo[0]
    kept = [
        name
        for name, path in (("model", "model.init_args.model"), ("data", "data.init_args.data"))
        if value_at(before, path, None) == value_at(session.content, path, None) is not None
    ]
    task = task_of_config(before)
    return render("new.undo", t, kept=kept, task=t(f"new.task_{task.name}") if task else "")


def _change_task(session: Session, name: Any) -> dict[str, Any]:
    task = task_of_config(session.content)
    if task is not None and task.name == name:
        # A menu sends its value once more when it loses the focus.
        return session.content
    content = with_task(session.content, name)
    session.undo = (session.content, session.baseline)
    session.copied_from, session.baseline = "", content
    return content


def _undo_task_change(session: Session, _: gr.EventData) -> dict[str, Any]:
    if session.undo is None:
        raise UserError("checks.nothing_to_undo")
    content, session.baseline = session.undo
    session.undo = None
    return content


def _load_named(session: Session, name: Any) -> dict[str, Any]:
    if not name:
        return session.content
    session.copied_from, session.undo = "", None
    session.baseline = load_recipe(name)
    return session.baseline


def read_recipe_file(file: Any) -> dict[str, Any]:
    """Returns the recipe in a file that was uploaded. Raises UserError if it is none."""
    path = Path(str(file))
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 4 * MAX_CHARACTERS:
        raise UserError("checks.upload_gone")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError("checks.yaml", line="?", reason="UTF-8") from error


def _recipe_summary(name: str) -> str:
    for line in recipe_files()[name].read_text(encoding="utf-8").splitlines():
        return line.removeprefix("# ").partition(". ")[0].rstrip(".")
    return ""
