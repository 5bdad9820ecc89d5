"""Review step: summary, recipe as YAML, command and Python, and the start button."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.experiments.estimates import planned_work
from gradio_app.guards import shortened
from gradio_app.pages import hub_job
from gradio_app.pages.components import field, html, on_event
from gradio_app.pages.error_reporting import localized_message
from gradio_app.pages.new import sweep
from gradio_app.pages.new.data_check import require_report, unavailable_model
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.pages.new.starting_point import validate_pasted
from gradio_app.pages.templating import message, render
from gradio_app.recipe.commands import COMMAND, FILE, python_code
from gradio_app.recipe.content import count_at, data_of, value_at
from gradio_app.recipe.edits import limit_steps
from gradio_app.recipe.fields import BY_PATH
from gradio_app.recipe.form import format_value, method_of
from gradio_app.recipe.presets import DEMO_BASE
from gradio_app.recipe.preview import DataReport, parser_error
from gradio_app.recipe.validation import validate_content
from gradio_app.recipe.yaml_text import dump_yaml, parse_yaml
from gradio_app.redaction import short_name
from gradio_app.settings import Settings
from gradio_app.texts import Texts
from lightning_peft.task_registry import task_of_config

_OPEN_RUN = "(id) => { if (id) window.location.assign('{url}' + encodeURIComponent(id)); }"
_DATA_ERRORS = {"checks.no_data", "checks.no_paths", "checks.no_rows", "checks.no_upload"}
_MODEL_ERRORS = {
    *("checks.no_model", "checks.model_size", "checks.remote", "checks.remote_here"),
    *("checks.remote_folder", "checks.own_code", "checks.not_installed"),
}


def build(editor: Editor) -> None:
    """Makes the step."""
    t = editor.t
    name = field(gr.Textbox, t, "new.name", "run-title", max_length=80)
    editor.show([name], lambda session: [_suggested_name(session)])
    with gr.Row(elem_id="start-strip"):
        facts = html(elem_id="start-facts")
        editor.needs.render()
    obstacles = html(elem_id="overview")
    # What was found for the recipe before does not stay while this one is checked.
    settings = editor.studio.settings
    editor.show([obstacles], lambda session: [overview(session, [], settings, t, asked=False)])
    with gr.Row(elem_id="start-row"):
        # Until the first look at the recipe there is nothing to start.
        waits: dict[str, Any] = {"size": "lg", "interactive": False}
        start = gr.Button(t("new.start"), variant="primary", elem_id="start", **waits)
        trial = gr.Button(t("new.dry_run"), elem_id="dry-run", **waits)
    note = html(elem_id="start-said")
    gone = gr.Textbox(visible="hidden", elem_id="gone-to")
    forms = html(elem_id="forms")
    with gr.Accordion(t("new.edit_yaml"), open=False, elem_id="edit-yaml"):
        text = field(
            gr.Textbox, t, "new.yaml", "yaml-text", lines=18, max_lines=30, elem_classes="code"
        )
        apply = gr.Button(t("new.apply_yaml"), elem_id="apply-yaml")
    editor.show([text, forms], lambda session: _yaml_updates(editor, session))

    def edited(session: Session, given: Any) -> dict[str, Any]:
        return validate_pasted(editor, session, parse_yaml(given))

    editor.bind(apply.click, edited, [text], own=True)
    buttons = [start, trial, note]
    for button, steps in ((start, None), (trial, 5)):
        handler = _start_handler(editor, steps)
        on_event(t, button.click, handler, [editor.session, name], [gone, *buttons])
    editor.after_change(_refresh_handler(editor), [], [obstacles, facts, text, forms, *buttons])
    sweep.build(editor, name, gone, startable)
    hub_job.build(editor.studio, t, text, name, gone)
    url = t.url("run", run="")
    gone.change(None, gone, None, js=_OPEN_RUN.replace("{url}", url))


def runnable_recipe(editor: Editor, session: Session) -> dict[str, Any]:
    """Returns the recipe as it would be run.

    Raises UserError with all that is wrong with it, what is typed in settings included.
    """
    problems: list[UserError] = []
    for path, refused in session.field_errors.items():
        label = editor.t(f"fields.{BY_PATH[path].key}")
        problems.append(UserError("checks.at", where=label, problem=[refused]))
    content = session.content
    try:
        content = validate_content(session.content, editor.studio.settings, session.owner)
    except UserError as refused:
        problems += refused.problems
    if problems:
        raise UserError("checks.all", problems=problems)
    return content


def displayed_content(editor: Editor, session: Session) -> dict[str, Any]:
    """Returns the recipe as it is read and downloaded: on a Space, without its places."""
    if editor.studio.settings.space:
        return session.content
    try:
        return validate_content(session.content, editor.studio.settings, session.owner)
    except UserError:
        return session.content


def _suggested_name(session: Session) -> Any:
    """Returns the name of a copy for its field, once: then it is the visitor's."""
    name, session.suggested_name = session.suggested_name, ""
    return name or gr.skip()


def _yaml_updates(editor: Editor, session: Session) -> list[Any]:
    content = displayed_content(editor, session)
    session.displayed_yaml = dump_yaml(content)
    return [session.displayed_yaml, forms(content, editor.t)]


def _refresh_handler(editor: Editor) -> Any:
    def refresh(session: Any, request: gr.Request) -> Iterator[list[Any]]:
        session = editor.of(session, request)
        made = partial(refreshed, session)
        yield from session.while_current("review", made, [gr.skip()] * 7)

    def refreshed(session: Session, still_needed: Callable[[], bool]) -> Iterator[list[Any]]:
        # What is typed there meanwhile stays, unless the look at the data has changed the recipe.
        same = dump_yaml(displayed_content(editor, session)) == session.displayed_yaml
        kept = [gr.skip(), gr.skip()]
        yield shown(session, None, kept if same else _yaml_updates(editor, session))
        try:
            content = runnable_recipe(editor, session)
        except UserError:
            return
        problem = _parser_error(editor, content, still_needed)
        yield shown(session, problem, kept)

    def shown(session: Session, problem: str | None, forms: list[Any]) -> list[Any]:
        blocking = _blockers(editor, session, problem)
        text = overview(session, blocking, editor.studio.settings, editor.t, problem is not None)
        facts = facts_html(session, editor.t)
        if session.starting:
            # What is said meanwhile stays.
            return [text, facts, *forms, *[gr.skip()] * 3]
        return [text, facts, *forms, *_buttons(editor.t, blocked=bool(blocking))]

    return refresh


def _blockers(editor: Editor, session: Session, problem: str | None) -> list[tuple[str, str]]:
    """Returns the obstacles, with the step in which each can be solved.

    ``problem`` is that of the command line; ``None`` until it has answered.
    """
    t = editor.t
    blocking: list[tuple[str, str]] = []
    try:
        runnable_recipe(editor, session)
    except UserError as refused:
        blocking += [(step_of(one), localized_message(one, t)) for one in refused.problems]
    report, missing = session.report, unavailable_model(session.content)
    if missing and not data_of(session.content):
        # Else the look at the data says so.
        reason = t("new.model_away", name=missing)
        blocking.append(("model", t("new.blocked_model", reason=reason)))
    if report is not None and not report.ok:
        step = "data" if report.numbers else report.step
        blocking.append((step, localized_message(_data_error(report), t)))
    if problem:
        blocking.append(("all", problem))
    return blocking


def _parser_error(
    editor: Editor, content: dict[str, Any], still_needed: Callable[[], bool] | None = None
) -> str:
    studio, question = editor.studio, ("fit", dump_yaml(content))
    find = partial(parser_error, content, studio.worker)
    return studio.answers.ask(question, find, lambda problem: not problem, still_needed)


def _start_handler(editor: Editor, steps: int | None) -> Any:
    def start(session: Any, name: Any, request: gr.Request) -> Iterator[list[Any]]:
        session = editor.of(session, request)
        if session.starting:
            yield [gr.skip()] * 4
            return
        session.starting = True
        try:
            yield [gr.skip(), *_buttons(editor.t, starting=True)]
            content, title = startable(editor, session, name, steps)
            run = editor.studio.start(session.owner, dump_yaml(content), title).id
        except Exception:
            session.starting = False
            yield [gr.skip(), *_buttons(editor.t)]
            raise
        session.starting = False
        yield [run, *_buttons(editor.t)]

    return start


def _buttons(t: Texts, starting: bool = False, blocked: bool = False) -> list[Any]:
    """Returns the state of both buttons and the text next to them."""
    free = not starting and not blocked
    said = message("note", t("new.starting"), t) if starting else ""
    label = t("new.start_busy" if starting else "new.start")
    return [gr.update(value=label, interactive=free), gr.update(interactive=free), said]


def startable(
    editor: Editor, session: Session, name: Any, steps: int | None = None
) -> tuple[dict[str, Any], str]:
    """Returns the recipe that is started, with all checked, and what it is called.

    Raises UserError if it cannot be started.
    """
    content = runnable_recipe(editor, session)
    if steps is not None:
        content = limit_steps(content, steps)
    report = require_report(editor, session)
    if not report.ok:
        raise _data_error(report)
    problem = _parser_error(editor, content)
    if problem:
        raise UserError("new.blocked_recipe", reason=shortened(problem, 400))
    return content, str(name or "").strip() or _default_title(content)


def _data_error(report: DataReport) -> UserError:
    """Returns why no run can be started with some data."""
    if report.needs_column_names and report.table is not None:
        return UserError("new.columns_say", names=", ".join(report.table.columns))
    if report.refusal or not report.numbers:
        key = "new.blocked_model" if report.step == "model" else "new.blocked_data"
        return UserError(key, reason=shortened(report.refusal, 300))
    return UserError("new.blocked_rows", rows=report.numbers.get("rejected", 0))


def _default_title(content: dict[str, Any]) -> str:
    """Returns the default name of a run: data and model."""
    data = short_name(data_of(content))
    model = short_name(value_at(content, "model.init_args.model", ""))
    return shortened(f"{data.partition('.')[0]} {model}", 80) or "run"


def step_of(problem: UserError) -> str:
    """Returns the step in which a problem can be solved."""
    keys, where = problem.reasons, str(problem.values.get("where", ""))
    if keys & _DATA_ERRORS:
        return "data"
    if keys & _MODEL_ERRORS or any(key.startswith("checks.folder_") for key in keys):
        return "model"
    if where.startswith(("model", "tokenizer", "revision")):
        return "model"
    return "data" if where.startswith("data") else "method"


def overview(
    session: Session, blocking: list[tuple[str, str]], settings: Settings, t: Texts, asked: bool
) -> str:
    """Returns the summary of the run, or the obstacles with links to their steps.

    ``asked`` indicates whether the command line has taken the recipe.
    """
    waits = "new.not_looked" if session.report is None else "" if asked else "new.not_asked"
    return render(
        "new.overview",
        t,
        summary=summary_text(session, t),
        # The recipe still has the values from before.
        stale=bool(session.field_errors),
        limits=settings.limits,
        blocking=blocking,
        waits=waits,
    )


def facts_html(session: Session, t: Texts) -> str:
    """Returns the method, and how much a run trains on."""
    work = planned_work(session.content, session.report.numbers) if session.report else None
    amount, unit = t("new.not_known"), "rows"
    if work is not None:
        unit = "tokens" if work.trained else "tokens_read" if work.tokens else "rows"
        amount = t.number(work.trained or work.tokens or work.rows)
    method = t(f"new.method_{method_of(session.content)}")
    cards = [(t("new.method"), method, ""), (t(f"new.strip_{unit}"), amount, "")]
    return render("parts.numbers", t, cards=cards, label="", kind="numbers")


def summary_text(session: Session, t: Texts) -> str:
    """Returns in a sentence what a run of the recipe does."""
    content = session.content
    task = task_of_config(content)
    model = value_at(content, "model.init_args.model", None)
    name = t("new.demo_base") if model == DEMO_BASE else Path(str(model or "-")).name
    splits = session.report.numbers.get("splits", {}) if session.report else {}
    place = short_name(data_of(content))
    words = [t("new.words_what", task=t(f"new.task_{task.name}") if task else "", model=name)]
    if splits:
        train, held = splits["train"]["rows"], splits["validation"]["rows"]
        words.append(t("new.words_rows", train=t.number(train), held=t.number(held), data=place))
    elif place:
        words.append(t("new.words_data", data=place))
    epochs = value_at(content, "trainer.max_epochs", None)
    steps = value_at(content, "trainer.max_steps", -1)
    batch = count_at(content, "data.init_args.batch_size", 8)
    accumulated = count_at(content, "trainer.accumulate_grad_batches", 1)
    each = batch * accumulated if batch and accumulated else "?"
    if isinstance(steps, int) and steps > 0:
        amount = t("new.words_steps", steps=steps)
    else:
        amount = t("new.words_epoch" if epochs == 1 else "new.words_epochs", epochs=epochs or 1000)
        batches = value_at(content, "trainer.limit_train_batches", 1.0)
        if not isinstance(batches, float):
            amount = t("new.words_of_batches", amount=amount, batches=format_value(batches))
        elif batches != 1:
            share = t.localized(f"{100 * batches:g}")
            amount = t("new.words_of_share", amount=amount, share=share)
    rate = t.localized(format_value(value_at(content, "model.init_args.learning_rate", 2e-4)))
    rank = value_at(content, "trainer.strategy.init_args.r", 16)
    words.append(t("new.words_how", amount=amount, rows=each, rate=rate, rank=rank))
    return ", ".join(words) + "."


def forms(content: dict[str, Any], t: Texts) -> str:
    """Returns the recipe as YAML, as a command, and as Python, each to be copied."""
    text = dump_yaml(content)
    try:
        code = python_code(content)
    except (KeyError, AttributeError, TypeError):
        code = "# -"
    shown = {"yaml": text, "command": COMMAND, "python": code}
    address = f"data:text/yaml;charset=utf-8,{quote(text)}"
    return render("new.forms", t, forms=shown, file=FILE, address=address)
