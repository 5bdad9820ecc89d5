"""Two to four runs side by side: curves, settings that differ, outcomes, and samples."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gradio_app.compare.results import AXES, LOSSES, loss_curve, same_validation_rows
from gradio_app.compare.selection import MAX_RUNS, RunSelection, parse_ids, select_runs
from gradio_app.pages import compare_html
from gradio_app.pages.layout import event_options, heading, on_load
from gradio_app.pages.plot import Series, plot
from gradio_app.runs.metrics import MetricsCache
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import owner_of

# Readable on white and on the dark ground; legend, letters and table tell the runs apart too.
COLORS = ("#6366f1", "#d97706", "#0d9488", "#db2777")
# The address follows the choice, so that a reload, or whoever gets the link, sees the same.
_FOLLOW = """
(ids) => {
  const url = new URL(window.location.href);
  if (ids && ids.length) url.searchParams.set('runs', ids.join(','));
  else url.searchParams.delete('runs');
  url.search = url.search.replaceAll('%2C', ',');
  window.history.replaceState(window.history.state, '', url);
}
"""


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    heading(t("compare.heading"), t("compare.below"))
    ComparePage(studio, t).bind()


class ComparePage:
    """The page that compares runs.

    Args:
        studio: Shared parts of the server.
        t: Texts.
    """

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        self._metrics = MetricsCache()
        self._runs = gr.Dropdown(
            [],
            value=[],
            multiselect=True,
            max_choices=MAX_RUNS,
            label=t("compare.runs"),
            info=t("compare.runs_more", most=MAX_RUNS),
            elem_id="compare-runs",
            interactive=True,
        )
        self._notice = gr.HTML("", elem_id="compare-notice", padding=False)
        with gr.Column(elem_id="compare-body", visible=False) as self._body:
            self._build_curves()
            self._parts = [
                gr.HTML("", elem_id=f"compare-{name}", padding=False)
                for name in ("outcomes", "differences", "samples")
            ]
        self._outputs = [
            self._notice,
            self._body,
            self._plot,
            self._text,
            self._table,
            *self._parts,
        ]

    def _build_curves(self) -> None:
        t = self.t
        with gr.Row(elem_id="compare-choices", equal_height=True):
            gr.HTML(f"<h2>{t('compare.curves')}</h2>", padding=False)
            self._loss = gr.Radio(
                [(t(f"run.{name}"), name) for name in LOSSES],
                value="val_loss",
                label=t("compare.loss"),
                elem_id="compare-loss",
                interactive=True,
            )
            self._axis = gr.Radio(
                [(t(f"compare.axis_{name}"), name) for name in AXES],
                value="step",
                label=t("compare.axis"),
                elem_id="compare-axis",
                interactive=True,
            )
        self._plot = gr.HTML("", elem_id="compare-plot", padding=False)
        self._text = gr.HTML("", elem_id="compare-text", padding=False)
        with gr.Accordion(t("run.as_table"), open=False, elem_id="compare-table"):
            self._table = gr.HTML("", padding=False)

    def bind(self) -> None:
        """Binds what happens."""
        given: list[Any] = [self._runs, self._loss, self._axis]
        on_load(self._on_load, given[1:], [self._runs, *self._outputs])
        self._runs.input(None, self._runs, None, js=_FOLLOW)
        for choice in given:
            choice.input(self._on_change, given, self._outputs, **event_options())

    def _on_load(self, loss: Any, axis: Any, request: gr.Request) -> list[Any]:
        owner = owner_of(request, self.studio.settings.space)
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
        owner = owner_of(request, self.studio.settings.space)
        found = select_runs(self.studio.store, owner, ids if isinstance(ids, list) else [])
        return self._updates(found, loss, axis, len(self.studio.store.list(owner)))

    def _updates(self, found: RunSelection, loss: Any, axis: Any, offered: int) -> list[Any]:
        t = self.t
        notice = compare_html.notice(found, offered, t)
        if len(found.runs) < 2:
            return [notice, gr.Column(visible=False), *[gr.skip()] * (len(self._outputs) - 2)]
        loss, axis = loss if loss in LOSSES else "val_loss", axis if axis in AXES else "step"
        metrics = [self._metrics.of(run.folder.metrics) for run in found.runs]
        curves = {
            label: loss_curve(one, loss, axis)
            for label, one in zip(found.labels, metrics, strict=True)
        }
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
            notice,
            gr.Column(visible=True),
            drawn,
            compare_html.summary(curves, loss, axis, same_validation_rows(found.runs), t),
            compare_html.curve_table(curves, axis, t),
            compare_html.outcomes(found, metrics, t),
            compare_html.settings_diff(found, t),
            compare_html.samples(found, t),
        ]
