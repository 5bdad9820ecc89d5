"""Sweep view: trials as a table and as parallel coordinates."""

from __future__ import annotations

from typing import Any

from gradio_app.compare.selection import MAX_RUNS
from gradio_app.errors import UserError
from gradio_app.experiments.sweeps import Trial, Trials, trials_of
from gradio_app.pages.components import Update, markup
from gradio_app.pages.parallel import Line, format_tried, parallel_coordinates
from gradio_app.pages.run.view import CurveOptions
from gradio_app.pages.templating import render
from gradio_app.recipe.fields import FIELDS
from gradio_app.recipe.form import format_value
from gradio_app.runs.formatting import format_duration, format_metric, metric
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts


class SweepSection:
    """The part of the page of a sweep that shows its trials; of other runs it is empty."""

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        self.outputs: list[Any] = [markup(elem_id="sweep-plot"), markup(elem_id="sweep-trials")]

    def updates(self, run: Run | None, choices: CurveOptions) -> list[Update]:
        """Returns how a sweep is shown."""
        if run is None or not run.is_sweep:
            return ["", ""]
        found = trials_of(run)
        return [_plot(found, self.t), self._table(found, run)]

    def _table(self, found: Trials, run: Run) -> str:
        t = self.t
        names = list(dict.fromkeys(name for trial in found.rows for name in trial.values))
        rows = [
            {
                "trial": trial,
                "best": trial.number == found.best,
                "state": _state(trial, run, t),
                "cells": [format_tried(trial.values.get(name), t) for name in names],
                "metric": "" if trial.metric is None else format_metric(trial.metric, t),
                "steps": self._steps(trial, run),
                "time": "" if trial.seconds is None else format_duration(trial.seconds, t),
                "url": t.url("run", run=trial.run),
            }
            for trial in found.rows
        ]
        heads = [_label(name, t) for name in names]
        return render("run.trials", t, rows=rows, names=heads, metric=metric(found.metric, t))

    def _steps(self, trial: Trial, run: Run) -> str:
        """Returns the steps of a trial; of the one that is trained, of how many."""
        if trial.state != "running" or not run.active:
            return "" if trial.steps is None else self.t.number(trial.steps)
        try:
            status = self.studio.store.get(run.owner, trial.run).status
        except UserError:
            return ""
        return f"{status.step} / {status.total_steps}" if status.total_steps else ""


def _state(trial: Trial, run: Run, t: Texts) -> str:
    if trial.state == "running" and not run.active:
        return t("run.state_stopped")
    key = f"run.trial_{trial.state}"
    return t(key) if t.has(key) else trial.state


def _plot(found: Trials, t: Texts) -> str:
    judged = [trial for trial in found.rows if trial.metric is not None]
    names = list(judged[0].values) if judged else []
    if not names:
        return ""
    ranked = _ranked(found)
    lines = [
        Line(
            t("run.trial_of", n=trial.number),
            [_plotted(trial.values.get(name)) for name in names] + [trial.metric],
            trial.number == found.best,
            1 - ranked.index(trial) / len(ranked),
        )
        for trial in judged
    ]
    titles = [*(_label(name, t) for name in names), metric(found.metric, t)]
    return parallel_coordinates(titles, lines, t)


def _ranked(found: Trials) -> list[Trial]:
    """Returns the trials that were judged, the best first."""
    judged = [trial for trial in found.rows if trial.metric is not None]
    return sorted(judged, key=lambda trial: trial.metric or 0.0, reverse=found.mode == "max")


def _plotted(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else format_value(value)


def _label(name: str, t: Texts) -> str:
    """Returns the label that the form has for a setting; others are called as they are."""
    last = name.rpartition(".")[2]
    return t(f"fields.{last}") if any(field.key == last for field in FIELDS) else name


def best_trial(run: Run, t: Texts) -> str:
    """Returns in words which trial is the best one; empty where none was finished."""
    found = trials_of(run)
    best = next((trial for trial in found.rows if trial.number == found.best), None)
    if best is None or best.metric is None:
        return ""
    values = ", ".join(f"{_label(name, t)} {format_tried(v, t)}" for name, v in best.values.items())
    value = f"{metric(found.metric, t)} {format_metric(best.metric, t)}"
    return t("run.best_trial", n=best.number, values=values, metric=value)


def compared_runs(run: Run) -> str:
    """Returns the ids of the runs that are compared: of a sweep, its best trials."""
    if not run.is_sweep:
        return run.id
    return ",".join(trial.run for trial in _ranked(trials_of(run))[:MAX_RUNS])
