"""What a recipe is started from: a task, a recipe of the package, a file, or a run."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Any

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.guards import escaped, shortened
from gradio_app.pages.frame import when_opened
from gradio_app.pages.handling import sentence
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.recipe.content import MISSING, value_at, with_value
from gradio_app.recipe.edits import base_recipe, load_recipe, recipe_of_run, with_method, with_task
from gradio_app.recipe.form import task_of
from gradio_app.recipe.presets import TASK_NAMES
from gradio_app.recipe.validation import validate_content
from gradio_app.recipe.yaml_text import MAX_CHARACTERS, parse_yaml
from gradio_app.texts import Texts
from lightning_peft.cli.recipes import recipe_files

_CLICKS = """
element.addEventListener('click', (event) => {
  if (event.target.closest('button[data-undo]')) trigger('click', {});
});
"""
_FORGET = """() => {
  const address = new URL(window.location.href);
  for (const name of ['from', 'recipe', 'method']) address.searchParams.delete(name);
  window.history.replaceState(window.history.state, '', address);
}"""


def build(editor: Editor) -> None:
    """Makes the part, and what happens when the page is opened."""
    t = editor.t
    notice = gr.HTML("", elem_id="new-notice", padding=False)
    task = gr.Radio(
        [(t(f"new.task_{_key(name)}"), name) for name in TASK_NAMES],
        label=t("new.task"),
        info=t("new.task_hint"),
        value="sft",
        interactive=True,
        elem_id="new-task",
    )
    with gr.Accordion(t("new.start_from"), open=False, elem_id="new-start-from"):
        named = gr.Dropdown(
            [(f"{name}: {_about(name)}", name) for name in recipe_files()],
            label=t("new.recipe"),
            value=None,
            interactive=True,
            elem_id="new-recipe",
        )
        file = gr.File(
            label=t("new.recipe_file"),
            file_types=[".yaml", ".yml"],
            height=120,
            elem_id="new-recipe-file",
        )
    undo = gr.HTML("", elem_id="task-undo", padding=False, js_on_load=_CLICKS)
    editor.show([task, notice, undo], lambda session: _shown(session, t))
    editor.bind_event(undo.click, _undone)
    editor.bind(task.input, _task, [task])
    editor.bind(named.input, _named, [named])

    def read(session: Session, given: Any) -> dict[str, Any]:
        session.since = checked(editor, session, read_recipe(given))
        return session.since

    editor.bind(file.upload, read, [file])


def bind_load(editor: Editor) -> None:
    """Fills the page when it is opened: from its address, from the draft, or anew."""

    def load(draft: Any, request: gr.Request) -> list[Any]:
        first = base_recipe("sft")
        session = editor.of(Session(first, first, opened=True), request)
        try:
            session.content = session.since = _asked_for(editor, session, draft, request)
            since = draft.get("since") if session.drafted else None
            if since:
                session.since = recognised(parse_yaml(since))
        except UserError as refused:
            session.told = sentence(refused, editor.t)
        editor.studio.worker.start()
        return editor.updates(session)

    loaded = when_opened(load, editor.draft, editor.outputs)
    # From now on the draft counts: opened again, the address would take all changes back.
    loaded.then(None, None, None, js=_FORGET)
    editor.then(loaded)


def _asked_for(editor: Editor, session: Session, draft: Any, request: gr.Request) -> dict[str, Any]:
    asked = dict(request.query_params)
    places = editor.places(session)
    if asked.get("from"):
        run = editor.studio.store.get(session.owner, asked["from"])
        content = recognised(recipe_of_run(parse_yaml(run.recipe_text), places))
        names = {other.name for other in editor.studio.store.list(session.owner)}
        session.copied, session.named = run.name, next_name(run.name, names)
        return content
    if asked.get("recipe"):
        content = load_recipe(asked["recipe"])
    elif asked.get("method"):
        return with_method(base_recipe("sft"), asked["method"])
    elif isinstance(draft, dict) and draft.get("recipe"):
        content, session.drafted = parse_yaml(draft["recipe"]), True
    else:
        return session.content
    return recognised(content)


def next_name(name: str, taken: Collection[str]) -> str:
    """Returns the name of a copy: the name with the next number that is not taken."""
    stem, dash, number = name.rpartition("-")
    stem = stem if dash and number.isdecimal() and len(number) < 4 else name
    return next(f"{stem}-{n}" for n in count(2) if f"{stem}-{n}" not in taken)


def copied(session: Session, t: Texts) -> str:
    """Returns of which run the recipe is a copy."""
    if not session.copied:
        return ""
    return f'<p class="copied" role="status">{escaped(t("new.copy_of", name=session.copied))}</p>'


def recognised(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe that the form can show.

    Raises:
        UserError: If it is for no task of this page.
    """
    if task_of(content) is None:
        raise UserError("checks.no_task")
    return content


def checked(editor: Editor, session: Session, content: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe that somebody wrote, checked but for the presence of its data.

    Raises:
        UserError: With all that is wrong with it.
    """
    try:
        validate_content(content, editor.studio.settings, session.owner)
    except UserError as refused:
        problems = refused.values.get("problems")
        left = [one for one in problems if not _of_places(one)] if isinstance(problems, list) else 0
        if left or not isinstance(problems, list):
            raise
    return _confirmed(editor, session, recognised(content))


def _confirmed(editor: Editor, session: Session, content: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe without leave to run code that was not given on this page."""
    names = [f"model.init_args.{name}" for name in ("model", "revision", "trust_remote_code")]
    wanted = [value_at(content, name, None) for name in names]
    if not wanted[-1] or wanted == [value_at(session.content, name, None) for name in names]:
        return content
    # Beside the page: whoever edits the text does not see the step of the model.
    told = editor.t("checks.code_left_out", name=shortened(wanted[0]))
    gr.Warning(escaped(told), title=editor.t("frame.refused"), duration=None)
    return with_value(content, names[-1], MISSING)


def _of_places(problem: UserError) -> bool:
    """Says whether a problem is one that the steps of the form can solve."""
    inner = problem.values.get("problem")
    keys = {one.key for one in inner} if isinstance(inner, list) else {problem.key}
    named = {"checks.no_data", "checks.no_paths", "checks.no_model", "checks.no_rows"}
    return bool(keys & named)


def _shown(session: Session, t: Texts) -> list[Any]:
    task = task_of(session.content)
    notice = ""
    if session.told:
        notice = f'<div class="alert" role="alert"><p>{escaped(session.told)}</p></div>'
        session.told = ""
    return [task.name if task else None, notice, _undo(session, t)]


def _undo(session: Session, t: Texts) -> str:
    """Returns what a change of the task has kept, with the button that takes it back."""
    if session.undo is None:
        return ""
    before = session.undo[0]
    kept = [
        t(f"new.kept_{name}")
        for name, path in (("model", "model.init_args.model"), ("data", "data.init_args.data"))
        if value_at(before, path, None) == value_at(session.content, path, None) is not None
    ]
    task = task_of(before)
    key = {0: "new.kept_nothing", 1: "new.kept_one", 2: "new.kept_both"}[len(kept)]
    said = t(key, what=kept[0] if kept else "")
    back = t("new.undo_task", task=t(f"new.task_{_key(task.name)}") if task else "")
    return (
        f'<p class="copied" role="status">{escaped(said)} '
        f'<button type="button" class="as-button small" data-undo>{escaped(back)}</button></p>'
    )


def _task(session: Session, name: Any) -> dict[str, Any]:
    content = with_task(session.content, name)
    session.undo = (session.content, session.since)
    session.copied, session.since = "", content
    return content


def _undone(session: Session, _: gr.EventData) -> dict[str, Any]:
    if session.undo is None:
        raise UserError("checks.nothing_to_undo")
    content, session.since = session.undo
    session.undo = None
    return content


def _named(session: Session, name: Any) -> dict[str, Any]:
    if not name:
        return session.content
    session.copied, session.undo = "", None
    session.since = load_recipe(name)
    return session.since


def read_recipe(file: Any) -> dict[str, Any]:
    """Returns the recipe in a file that was uploaded.

    Raises:
        UserError: If it is none.
    """
    path = Path(str(file))
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 4 * MAX_CHARACTERS:
        raise UserError("checks.upload_gone")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError("checks.yaml", line="?", reason="UTF-8") from error


def _key(name: str) -> str:
    return name.replace("-", "_")


def _about(name: str) -> str:
    for line in recipe_files()[name].read_text(encoding="utf-8").splitlines():
        return line.removeprefix("# ").partition(". ")[0].rstrip(".")
    return ""
