"""Comparison of two to four runs: curves, settings, results and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from gradio_app.assets import script
from gradio_app.chat.prompts import MAX_SCORED, held_out_prompts
from gradio_app.compare.recipe_diff import differences
from gradio_app.compare.results import AXES, LOSSES, comparable, compare_answers, loss_curve
from gradio_app.compare.selection import MAX_RUNS, RunSelection, parse_ids, select_runs
from gradio_app.pages.components import field, html, on_event, on_load
from gradio_app.pages.layout import heading
from gradio_app.pages.plot import Series, curve_table, plot
from gradio_app.pages.run.live_html import answer_cell, prompt_turns, shortened_cell
from gradio_app.pages.run_state import state_badge
from gradio_app.pages.templating import render
from gradio_app.recipe.fields import BY_PATH
from gradio_app.runs.curves import spread
from gradio_app.runs.formatting import format_bytes, format_duration, format_number, metric
from gradio_app.runs.metrics import Metrics, metrics_of
from gradio_app.runs.outcomes import Outcome, outcome_of
from gradio_app.studio import Studio
from gradio_app.texts import Texts

# Readable on white and on the dark ground; legend, letters and table tell the runs apart too.
COLORS = ("#6366f1", "#d97706", "#0d9488", "#db2777")
# The address follows the choice, so that a reload, or whoever gets the link, sees the same.
_FOLLOW = script("address.js")
Curves = Mapping[str, Sequence[tuple[float, float]]]
TABLE_ROWS = 12
_MAX_DIFFERENCES = 60
_DASH = "\u2013"
# Settings that are chosen in other steps of the form than its fields.
_OTHER_STEPS = {
    "model.class_path": "task",
    "model.init_args.model": "model",
    "data.init_args.data": "data",
    "trainer.strategy.class_path": "method",
}


# Parts of paths that say nothing of a setting.
_NOT_SHOWN = {"model", "data", "trainer", "strategy", "callbacks", "init_args", "class_path"}


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    heading(t("compare.heading"), t)
    ComparePage(studio, t).bind()


class ComparePage:
    """The page that compares runs."""

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        hint = t("compare.runs_hint", most=MAX_RUNS)
        several: dict[str, Any] = {
            "choices": [],
            "value": [],
            "multiselect": True,
            "max_choices": MAX_RUNS,
        }
        self._runs = field(gr.Dropdown, t, "compare.runs", "compare-runs", info=hint, **several)
        notice = html(elem_id="compare-notice")
        with gr.Column(elem_id="compare-body", visible=False) as body:
            curves = self._build_curves()
            names = ("outcomes", "differences", "samples")
            parts = [html(elem_id=f"compare-{name}") for name in names]
        self._outputs = [notice, body, *curves, *parts]

    def _build_curves(self) -> list[Any]:
        t = self.t
        with gr.Row(elem_id="compare-choices", equal_height=True):
            html(f"<h2>{t('compare.curves')}</h2>")
            self._loss = field(
                gr.Radio, t, "compare.loss", "compare-loss", ("run.", LOSSES), value="val_loss"
            )
            self._axis = field(
                gr.Radio, t, "compare.axis", "compare-axis", ("compare.axis_", AXES), value="step"
            )
        shown = [html(elem_id="compare-plot"), html(elem_id="compare-text")]
        with gr.Accordion(t("run.as_table"), open=False, elem_id="compare-table"):
            return [*shown, html()]

    def bind(self) -> None:
        """Binds what happens."""
        given: list[Any] = [self._runs, self._loss, self._axis]
        on_load(self._on_load, given[1:], [self._runs, *self._outputs])
        self._runs.input(None, self._runs, None, js=_FOLLOW)
        events = [choice.input for choice in given]
        on_event(self.t, events, self._on_change, given, self._outputs)

    def _on_load(self, loss: Any, axis: Any, request: gr.Request) -> list[Any]:
        owner = self.studio.owner(request)
        found = select_runs(
            self.studio.store, owner, parse_ids(str(request.query_params.get("runs") or ""))
        )
        # All that one may see are offered, and no others can be chosen.
        offered = [(run.name, run.id) for run in self.studio.store.list(owner)]
        names = [name for name, _ in offered]
        choices = [
            (f"{name} ({run_id[:15]})" if names.count(name) > 1 else name, run_id)
            for name, run_id in offered
        ]
        picker = gr.Dropdown(choices=choices, value=[run.id for run in found.runs])
        return [picker, *self._updates(found, loss, axis, len(offered))]

    def _on_change(self, ids: Any, loss: Any, axis: Any, request: gr.Request) -> list[Any]:
        owner = self.studio.owner(request)
        found = select_runs(self.studio.store, owner, ids if isinstance(ids, list) else [])
        return self._updates(found, loss, axis, len(self.studio.store.list(owner)))

    def _updates(self, found: RunSelection, loss: Any, axis: Any, offered: int) -> list[Any]:
        t = self.t
        shown = notice(found, offered, t)
        if len(found.runs) < 2:
            return [shown, gr.Column(visible=False), *[gr.skip()] * (len(self._outputs) - 2)]
        loss, axis = loss if loss in LOSSES else "val_loss", axis if axis in AXES else "step"
        metrics = [metrics_of(run.folder.metrics) for run in found.runs]
        curves = {
            label: loss_curve(one, loss, axis)
            for label, one in zip(found.labels, metrics, strict=True)
        }
        some = {label: spread(points, TABLE_ROWS) for label, points in curves.items()}
        series = [
            Series(label, color, points)
            for (label, points), color in zip(curves.items(), COLORS, strict=False)
        ]
        drawn = plot(
            series,
            t,
            x_title=t(f"compare.axis_{axis}"),
            y_title=t(f"run.{loss}"),
            empty=t("run.curves_empty"),
            whole_x=axis == "step",
        )
        return [
            shown,
            gr.Column(visible=True),
            drawn,
            summary(curves, loss, axis, comparable(found.runs), t),
            curve_table(some, t(f"compare.axis_{axis}"), t),
            outcomes(found, metrics, t),
            settings_diff(found, t),
            samples(found, t),
        ]


def notice(found: RunSelection, offered: int, t: Texts) -> str:
    """Returns the notice for runs that cannot be compared or are too few."""
    problems = []
    if found.missing:
        problems.append(t("compare.missing", runs=", ".join(found.missing)))
    if found.too_many:
        problems.append(t("compare.too_many", most=MAX_RUNS))
    chosen = len(found.runs)
    return render("compare.notice", t, problems=problems, chosen=chosen, offered=offered)


def summary(curves: Curves, loss: str, axis: str, ranked: bool, t: Texts) -> str:
    """Returns in sentences what the curves show; only losses on the same rows are ranked."""
    said, ends = [], {}
    for label, points in curves.items():
        if not points:
            said.append(t("compare.no_curve", run=label, loss=t(f"run.{loss}")))
            continue
        ends[label] = points[-1][1]
        least = min(value for _, value in points)
        said.append(
            t(
                "compare.curve",
                run=label,
                first=format_number(points[0][1], t),
                last=format_number(points[-1][1], t),
                at=_position(points[-1][0], axis, t),
                least=format_number(least, t),
            )
        )
    if not ranked:
        said.insert(0, t("compare.not_comparable"))
    elif len(ends) > 1:
        best = min(ends, key=lambda label: ends[label])
        lowest = format_number(ends[best], t)
        if [format_number(value, t) for value in ends.values()].count(lowest) == 1:
            said.insert(0, t("compare.best", run=best, loss=t(f"run.{loss}"), value=lowest))
    return render("compare.summary", t, sentences=said)


def _position(x: float, axis: str, t: Texts) -> str:
    key = "compare.at_step" if axis == "step" else "compare.at_minute"
    return t(key, step=int(x), n=t.localized(f"{x:.3g}"))


def outcomes(found: RunSelection, metrics: Sequence[Metrics], t: Texts) -> str:
    """Returns the outcomes of the runs."""
    known = [outcome_of(run, one) for run, one in zip(found.runs, metrics, strict=True)]
    names = dict.fromkeys(name for one in known for name in one.after)
    rows: list[tuple[str, list[str]]] = [
        (metric(name, t), [_change(one, name, t) for one in known]) for name in names
    ]
    for key, values in (
        ("steps", [_optional_number(one.steps, t) for one in known]),
        ("time", [format_duration(one.seconds, t) if one.seconds else "" for one in known]),
        ("memory", [format_bytes(one.memory, t) if one.memory else "" for one in known]),
        ("trainable", [_optional_number(one.trainable, t) for one in known]),
    ):
        rows.append((t(f"compare.{key}"), values))
    runs = [
        (t.url("run", run=run.id), label, state_badge(run, t))
        for run, label in zip(found.runs, found.labels, strict=True)
    ]
    return render("compare.outcomes", t, runs=runs, rows=rows)


def _change(one: Outcome, name: str, t: Texts) -> str:
    if name not in one.after:
        return ""
    after = format_number(one.after[name], t)
    return f"{format_number(one.before[name], t)} \u2192 {after}" if name in one.before else after


def _optional_number(value: int | None, t: Texts) -> str:
    return "" if value is None else t.number(value)


def settings_diff(found: RunSelection, t: Texts) -> str:
    """Returns the settings that differ."""
    seen = differences([run.recipe_text for run in found.runs])
    known = {*BY_PATH, *_OTHER_STEPS}
    rows = [
        (
            path,
            _label(path, t),
            [_DASH if value is None else shortened_cell(value) for value in values],
        )
        for path, values in sorted(seen.rows, key=lambda row: row[0] not in known)
    ][:_MAX_DIFFERENCES]
    return render(
        "compare.settings",
        t,
        unreadable=[found.labels[place] for place in seen.unreadable],
        head=[t("compare.setting"), *found.labels],
        rows=rows,
        rest=len(seen.rows) - len(rows),
        same=seen.same,
    )


def _label(path: str, t: Texts) -> str:
    """Returns the form's label of a setting, or what the words of its path say."""
    if path in BY_PATH:
        return t(f"fields.{BY_PATH[path].key}")
    if path in _OTHER_STEPS:
        return t(f"compare.path_{_OTHER_STEPS[path]}")
    words = [word for word in path.split(".") if word not in _NOT_SHOWN] or [path]
    return " ".join(words).replace("_", " ").capitalize()


def samples(found: RunSelection, t: Texts) -> str:
    """Returns the samples of the runs for the same prompts."""
    said, note = compare_answers(found.runs), t("compare.samples_note")
    if not said:
        recorded = any(run.folder.samples.is_file() for run in found.runs)
        note = t("compare.no_shared_samples" if recorded else "compare.no_samples")
    columns = [(t("run.prompt"), ""), (t("run.expected"), "")]
    answers = [
        [
            answer_cell(None if text is None else {"generated": text, "expected": one.expected})
            for text in one.answers
        ]
        for one in said
    ]
    for place, label in enumerate(found.labels):
        given = [cell for cells in answers if (cell := cells[place]) is not None]
        exact = sum(cell["correct"] for cell in given)
        columns.append((label, t("run.samples_right", n=exact, of=len(given))))
    known = [row for run in found.runs for row in held_out_prompts(run, MAX_SCORED)]
    rows = [
        {
            "turns": prompt_turns(one.prompt, one.expected, known),
            "expected": shortened_cell(one.expected),
            "answers": cells,
        }
        for one, cells in zip(said, answers, strict=True)
    ]
    title = t("compare.samples")
    table = render("live.samples", t, columns=columns, rows=rows, label=title) if said else ""
    return render("compare.samples", t, table=table, note=note)
