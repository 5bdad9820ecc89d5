"""The review as HTML: a paragraph in words, what is in the way, and the recipe in three forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from gradio_app.errors import UserError
from gradio_app.guards import escaped
from gradio_app.pages.new.editor import Session
from gradio_app.recipe.commands import FILE, command_line, python_code
from gradio_app.recipe.content import data_of, value_at
from gradio_app.recipe.form import format_value, method_of
from gradio_app.recipe.presets import DEMO_BASE
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.settings import Settings
from gradio_app.texts import Texts
from lightning_peft.task_registry import task_of_config

_DATA_ERRORS = {
    *("checks.no_data", "checks.no_paths", "checks.no_rows", "checks.no_upload"),
}
_MODEL_ERRORS = {
    *("checks.no_model", "checks.model_size", "checks.remote", "checks.remote_here"),
    *("checks.remote_folder", "checks.own_code"),
}


def step_of(problem: UserError) -> str:
    """Returns the step in which a problem can be solved."""
    inner = problem.values.get("problem")
    keys = {one.key for one in inner} if isinstance(inner, list) else {problem.key}
    where = str(problem.values.get("where", ""))
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

    Args:
        session: What the page edits.
        blocking: The step in which something can be solved, and what that is.
        settings: What the server was started with.
        t: The texts.
        asked: Whether the command line has said that it takes the recipe.
    """
    kind, stale = "plain", ""
    if session.field_errors:
        # The recipe still has the values from before.
        kind, stale = "plain stale", f'<p class="note">{escaped(t("new.words_stale"))}</p>'
    text = f'<p class="{kind}">{escaped(summary_text(session, t))}</p>{stale}'
    limits = settings.limits
    if limits.steps is not None:
        message = t("new.limited", steps=limits.steps, rows=limits.rows, minutes=limits.minutes)
        text += f'<p class="note">{escaped(message)}</p>'
    if blocking:
        items = "".join(
            f'<li>{escaped(reason)} <a href="#{step}">{escaped(t(f"new.to_{step}"))}</a></li>'
            for step, reason in blocking
        )
        heading = escaped(t("new.blocked"))
        alert = f'<section class="failure" role="alert"><h3>{heading}</h3><ul>{items}</ul>'
        return f"{text}{alert}</section>"
    if session.report is None or not asked:
        waits = t("new.not_looked" if session.report is None else "new.not_asked")
        return f'{text}<p class="busy" role="status">{escaped(waits)}</p>'
    return f'{text}<p class="fine" role="status">\u2713 {escaped(t("new.ready"))}</p>'


def summary_text(session: Session, t: Texts) -> str:
    """Returns in a paragraph what a run of the recipe does."""
    content = session.content
    task = task_of_config(content)
    model = value_at(content, "model.init_args.model", None)
    name = t("new.demo_base") if model == DEMO_BASE else Path(str(model or "-")).name
    splits = session.report.numbers.get("splits", {}) if session.report else {}
    place = data_of(content).rpartition("/")[2]
    words = [
        t(
            "new.words_what",
            task=t(f"new.task_{task.name.replace('-', '_')}") if task else "",
            model=name,
            method=t(f"new.short_{method_of(content)}"),
        )
    ]
    if splits:
        train, held = splits["train"]["rows"], splits["validation"]["rows"]
        words.append(t("new.words_rows", train=t.number(train), held=t.number(held), data=place))
    elif place:
        words.append(t("new.words_data", data=place))
    epochs = value_at(content, "trainer.max_epochs", None)
    steps = value_at(content, "trainer.max_steps", -1)
    batch = value_at(content, "data.init_args.batch_size", 8)
    each = batch * value_at(content, "trainer.accumulate_grad_batches", 1)
    amount = (
        t("new.words_steps", steps=steps)
        if isinstance(steps, int) and steps > 0
        else t("new.words_epoch" if epochs == 1 else "new.words_epochs", epochs=epochs or 1000)
    )
    rate = t.localized(format_value(value_at(content, "model.init_args.learning_rate", 2e-4)))
    rank = value_at(content, "trainer.strategy.init_args.r", 16)
    words.append(t("new.words_how", amount=amount, rows=each, rate=rate, rank=rank))
    words = [", ".join(words) + "."]
    batches = value_at(content, "trainer.limit_train_batches", None)
    if batches not in (None, 1.0):
        words.append(t("new.words_limited", batches=t.localized(format_value(batches))))
    words.append(t("new.words_end"))
    return " ".join(words)


def forms(content: dict[str, Any], t: Texts) -> str:
    """Returns the recipe as YAML, as a command, and as Python, each to be copied."""
    text = dump_yaml(content)
    address = f"data:text/yaml;charset=utf-8,{quote(text)}"
    download = (
        f'<a class="as-button small" download="{FILE}" href="{address}">'
        f"{escaped(t('new.download_yaml'))}</a>"
    )
    try:
        code = python_code(content)
    except (KeyError, AttributeError, TypeError):
        code = "# -"
    return (
        _form(t("new.yaml"), text, "yaml", t, download)
        + _form(t("new.command"), command_line(content), "command", t)
        + _form(t("new.python"), code, "python", t)
    )


def _form(title: str, text: str, name: str, t: Texts, more: str = "") -> str:
    heading, copied = escaped(title), escaped(t("new.copy_named", what=title))
    return (
        f'<section class="form" id="form-{name}"><div class="bar-of"><h3>{heading}</h3>'
        f'<span>{more} <button type="button" class="as-button small" data-copies="{escaped(text)}" '
        f'aria-label="{copied}">{escaped(t("new.copy"))}</button></span></div>'
        f'<pre tabindex="0" aria-label="{heading}">{escaped(text)}</pre></section>'
    )
