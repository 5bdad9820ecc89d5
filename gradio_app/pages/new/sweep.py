"""Sweep section of the review step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.experiments.sweeps import (
    MAX_TRIALS,
    PRUNERS,
    SAMPLERS,
    SweepRequest,
    is_available,
    swept_fields,
    tried_values,
)
from gradio_app.guards import shortened
from gradio_app.pages.components import field, html, on_event
from gradio_app.pages.error_reporting import localized_message
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.pages.templating import message
from gradio_app.recipe.fields import BY_PATH, Field
from gradio_app.texts import Texts

# So many settings can be tried; more than a few values of each are too many runs.
ROWS = 3
Startable = Callable[[Editor, Session, Any], tuple[dict[str, Any], str]]


def build(editor: Editor, name: Any, gone: Any, startable: Startable) -> None:
    """Makes the part.

    Args:
        editor: The page.
        name: The field with the name of the run.
        gone: What opens the page of the run whose id it is given.
        startable: Returns the checked recipe and its name; raises UserError if there is none.
    """
    t = editor.t
    with gr.Accordion(t("new.sweep"), open=False, elem_id="sweep"):
        if editor.studio.settings.space:
            minutes = t.localized(f"{editor.studio.settings.limits.minutes:g}")
            html(message("note", t("new.sweep_space", minutes=minutes), t))
            return
        rows = [_build_row(number, t) for number in range(1, ROWS + 1)]
        with gr.Row(elem_classes="settings"):
            samplers, pruners = ("new.sampler_", SAMPLERS), ("new.pruner_", PRUNERS)
            sampler = field(gr.Radio, t, "new.sampler", "sweep-sampler", samplers, value="grid")
            trials = field(gr.Textbox, t, "new.trials", "sweep-number", value="", max_length=6)
            pruner = field(gr.Radio, t, "new.pruner", "sweep-pruner", pruners, value="none")
        count = html(elem_id="sweep-count")
        start = gr.Button(t("new.sweep_start"), elem_id="sweep-start", interactive=is_available())
        if not is_available():
            html(message("note", t("new.sweep_missing"), t))
    keys = [key for key, _ in rows]
    editor.show(keys, lambda session: [_choices(session, t)] * ROWS)
    inputs = [sampler, trials, pruner, *(one for row in rows for one in row)]

    def begin(
        session: Any, title: Any, request: gr.Request, *given: Any
    ) -> Iterator[tuple[Any, Any]]:
        session = editor.of(session, request)
        if session.starting:
            yield gr.skip(), gr.skip()
            return
        asked, _ = _requested(session.content, given, t)
        if asked is None:
            raise UserError("new.sweep_empty")
        session.starting = True
        try:
            yield gr.skip(), gr.Button(t("new.start_busy"), interactive=False)
            content, title = startable(editor, session, title)
            run = editor.studio.start_sweep(session.owner, content, title, asked).id
        except Exception:
            yield gr.skip(), gr.Button(t("new.sweep_start"), interactive=True)
            raise
        finally:
            session.starting = False
        yield run, gr.Button(t("new.sweep_start"), interactive=True)

    def counted(session: Any, request: gr.Request, *given: Any) -> str:
        return _count(editor.of(session, request).content, given, t)

    events: list[Any] = []
    for one in inputs:
        events += [one.blur, one.submit] if isinstance(one, gr.Textbox) else [one.input]
    options = {"show_progress": "hidden", "trigger_mode": "always_last"}
    on_event(t, events, counted, [editor.session, *inputs], count, **options)
    on_event(t, start.click, begin, [editor.session, name, *inputs], [gone, start])


def _build_row(number: int, t: Texts) -> tuple[Any, Any]:
    with gr.Row(elem_classes="settings"):
        key = field(gr.Dropdown, t, "new.sweep_setting", f"sweep-setting-{number}", choices=[])
        values = field(
            gr.Textbox,
            t,
            "new.sweep_values",
            f"sweep-values-{number}",
            placeholder=t("new.sweep_example"),
            max_length=500,
        )
    return key, values


def _count(content: dict[str, Any], given: Sequence[Any], t: Texts) -> str:
    """Returns how many trials there are to be and the values read, or why there can be none."""
    try:
        request, combinations = _requested(content, given, t)
    except UserError as refused:
        return message("field-problem", f"\u2717 {localized_message(refused, t)}", t, "alert")
    if request is None:
        return ""
    count = t("new.sweep_count", n=request.trials or combinations)
    values = (_read_values(BY_PATH[path], text, t) for path, text in request.values.items())
    return message("note", " \u00b7 ".join([count, *values]), t)


def _read_values(setting: Field, text: str, t: Texts) -> str:
    values = text.replace(",", "; ")
    if setting.kind not in ("choice", "switch"):
        values = "..".join(map(t.localized, values.split("..")))
    return f"{t(f'fields.{setting.key}')}: {values}"


def _choices(session: Session, t: Texts) -> Any:
    found = [(t(f"fields.{one.key}"), one.path) for one in swept_fields(session.content)]
    return gr.update(choices=[("\u2013", ""), *found])


def _requested(
    content: dict[str, Any], given: Sequence[Any], t: Texts
) -> tuple[SweepRequest | None, int | None]:
    """Returns the settings of the sweep and the number of combinations; ``None`` with a range.

    The request is ``None`` where no setting has values. Raises UserError for what cannot be tried.
    """
    sampler, trials, pruner, *rows = given
    if sampler not in SAMPLERS or pruner not in PRUNERS:
        raise UserError("checks.choice", value=sampler, known=", ".join(SAMPLERS))
    values: dict[str, str] = {}
    counts: list[int | None] = []
    for path, text in zip(rows[::2], rows[1::2], strict=True):
        if not path or not str(text or "").strip():
            continue
        if str(path) in values:
            raise UserError("new.sweep_twice")
        setting = BY_PATH.get(str(path))
        if setting is None or setting not in swept_fields(content):
            name = t(f"fields.{setting.key}") if setting else shortened(path)
            raise UserError("new.sweep_unknown", name=name)
        try:
            values[setting.path], count = tried_values(setting, str(text), t.language == "de")
        except UserError as refused:
            label = t(f"fields.{setting.key}")
            raise UserError("checks.at", where=label, problem=[refused]) from None
        counts.append(count)
    if not values:
        return None, None
    combinations = None if None in counts else prod(one or 1 for one in counts)
    if sampler == "grid":
        if combinations is None:
            raise UserError("new.sweep_range")
        if combinations > MAX_TRIALS:
            raise UserError("checks.range", value=combinations, least=1, most=MAX_TRIALS)
        return SweepRequest(values, "grid", None, str(pruner)), combinations
    text = str(trials or "").strip()
    if not text.isdecimal() or not 1 <= int(text[:6]) <= MAX_TRIALS:
        raise UserError("new.sweep_trials", most=MAX_TRIALS)
    return SweepRequest(values, str(sampler), int(text), str(pruner)), combinations
