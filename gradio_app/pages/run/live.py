"""Live view of a run: numbers, curves, samples, alerts and log."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gradio_app.assets import script
from gradio_app.chat.prompts import MAX_SCORED, held_out_prompts
from gradio_app.pages.components import Update, field, markup
from gradio_app.pages.plot import Series, plot
from gradio_app.pages.run import live_html
from gradio_app.pages.run.evaluation_html import evaluation
from gradio_app.pages.run.view import CurveOptions
from gradio_app.pages.templating import render
from gradio_app.runs.curves import Points, downsample, finite_points, smooth
from gradio_app.runs.files import LOG_LINES, read_rows, remove_noise, tail
from gradio_app.runs.health import HealthMonitor
from gradio_app.runs.local import START_LOG
from gradio_app.runs.metrics import Metrics, load_of, metrics_of
from gradio_app.runs.types import Run
from gradio_app.texts import Texts

# Plots of the load: title, unit, and curves.
_LOAD: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("busy", 1, ("cpu_percent", "cuda_percent")),
    ("memory", 1e9, ("process_bytes", "cuda_bytes")),
    ("speed", 1, ("tokens_per_second",)),
)
# Readable on white and on the dark ground; the series also have names.
TRAINING, VALIDATION = "#6366f1", "#d97706"
# The text of the log is set as text, so that nothing in it is taken for HTML, and the place that a
# reader has scrolled to, and the focus, stay.
_LOG = '<pre role="log" tabindex="0" aria-live="off" aria-label="{label}"></pre>'
_FOLLOW = script("log.js")
_COPY = (
    "() => { navigator.clipboard?.writeText(document.querySelector('#run-log pre').textContent); }"
)


class Live:
    """The tab of what a run does now."""

    def __init__(self, t: Texts) -> None:
        self.t, self._health = t, HealthMonitor()
        alerts, numbers = markup(elem_id="run-alerts"), markup(elem_id="run-numbers")
        curves = self._build_curves()
        markup(f"<h2>{t('run.samples')}</h2>")
        samples, evaluated = markup(elem_id="run-samples"), markup(elem_id="run-evaluation")
        self.outputs: list[Any] = [alerts, numbers, *curves, samples, evaluated, self._build_log()]

    def _build_curves(self) -> list[Any]:
        t = self.t
        with gr.Row(elem_id="curve-choices", equal_height=True):
            markup(f"<h2>{t('run.curves')}</h2>")
            weights = ("run.smooth_", ("none", "light", "strong"))
            smoothing = field(
                gr.Radio,
                t,
                "run.smoothing",
                "curve-smoothing",
                weights,
                value="none",
                scale=0,
                min_width=280,
            )
            log = field(gr.Checkbox, t, "run.log_scale", "curve-log", scale=0)
            least: dict[str, Any] = {"value": 0, "minimum": 0, "precision": 0, "scale": 0}
            first = field(gr.Number, t, "run.from_step", "curve-first", min_width=120, **least)
            self.choices = [smoothing, log, first]
        shown = [markup(elem_id="loss-plot"), markup(elem_id="curve-text")]
        with gr.Accordion(t("run.as_table"), open=False, elem_id="curve-table"):
            shown.append(markup())
        with gr.Accordion(t("run.rate"), open=False, elem_id="rate"):
            shown.append(markup(elem_id="rate-plot"))
        with gr.Accordion(t("run.load"), open=False, elem_id="load"):
            shown.append(markup(elem_id="load-plots"))
        return shown

    def _build_log(self) -> Any:
        t = self.t
        with gr.Row(elem_id="log-choices", equal_height=True):
            markup(f"<h2>{t('run.log', lines=LOG_LINES)}</h2>")
            field(gr.Checkbox, t, "run.follow", "log-follow", value=True, scale=0)
            copy = gr.Button(t("run.copy"), size="sm", elem_id="log-copy", scale=0)
            copy.click(None, None, None, js=_COPY)
        return markup(
            t("run.log_empty"),
            html_template=_LOG.format(label=t("run.log_label")),
            js_on_load=_FOLLOW,
            elem_id="run-log",
        )

    def updates(self, run: Run | None, choices: CurveOptions) -> list[Update]:
        """Returns how a run is shown."""
        if run is None:
            return [(gr.skip(), None)] * len(self.outputs)
        metrics, t = metrics_of(run.folder.metrics), self.t
        events = run.redactor.value(list(read_rows(run.folder.events, 200_000)))
        known = held_out_prompts(run, MAX_SCORED)
        log = remove_noise(tail(run.folder.log) or tail(run.folder.path / START_LOG))
        return [
            live_html.alerts(events, self._health.warnings(run), t),
            live_html.numbers(metrics, t),
            self._loss_plot(metrics, choices),
            live_html.summary(metrics, t),
            live_html.curve_table(metrics, t),
            self._rate_plot(metrics),
            self._load_plots(run),
            live_html.samples(list(read_rows(run.folder.samples)), known, t),
            evaluation(run, t),
            run.redactor.text(log) or t("run.log_empty"),
        ]

    def _loss_plot(self, metrics: Metrics, choices: CurveOptions) -> str:
        t = self.t
        training = smooth(metrics.curve("train_loss"), choices.smoothing)
        curves = [
            _series(name, color, [point for point in points if point[0] >= choices.first])
            for name, color, points in (
                (t("run.training"), TRAINING, training),
                (t("run.validation"), VALIDATION, metrics.curve("val_loss")),
            )
        ]
        return plot(
            curves,
            t,
            x_title=t("run.axis_step"),
            y_title=t("run.axis_loss"),
            empty=t("run.curves_empty"),
            log_y=choices.logarithmic,
        )

    def _rate_plot(self, metrics: Metrics) -> str:
        t = self.t
        return plot(
            [_series(t("run.training"), TRAINING, metrics.curve("learning_rate"))],
            t,
            x_title=t("run.axis_step"),
            y_title=t("run.axis_rate"),
            empty=t("run.curves_empty"),
        )

    def _load_plots(self, run: Run) -> str:
        """Returns plots of processor, memory and speed over the time of the run."""
        t, load = self.t, load_of(run.folder.load)
        plots = []
        for title, unit, names in _LOAD:
            curves = [
                _series(
                    t(f"run.load_{name}"), color, [(x / 60, y / unit) for x, y in load.curve(name)]
                )
                for name, color in zip(names, (TRAINING, VALIDATION), strict=False)
            ]
            drawn = plot(
                curves,
                t,
                x_title=t("run.axis_minutes"),
                y_title=t(f"run.load_{title}"),
                empty=t("run.load_empty"),
                whole_x=False,
                from_zero=True,
            )
            plots.append(drawn)
        return render("live.plots", t, plots=plots)


def _series(name: str, color: str, points: Points) -> Series:
    return Series(name, color, downsample(finite_points(points)))
