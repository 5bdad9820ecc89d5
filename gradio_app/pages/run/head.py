"""Header of a run: name, state, progress, and the reason of an early end."""

from __future__ import annotations

import time
from typing import Any

from gradio_app.guards import escaped
from gradio_app.pages.components import Update, markup
from gradio_app.pages.run.sweep import best_trial
from gradio_app.pages.run.view import CurveOptions
from gradio_app.pages.run_state import (
    percent_done,
    phase_progress,
    phase_text,
    state_badge,
    time_left,
)
from gradio_app.pages.templating import message, render
from gradio_app.runs.failures import find_failure, report
from gradio_app.runs.files import read_json_object
from gradio_app.runs.formatting import format_duration, format_metric, format_number
from gradio_app.runs.local import GRACE_SECONDS
from gradio_app.runs.loss_increase import find_loss_increase, finished_worse, validation_losses
from gradio_app.runs.metrics import metrics_of
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts


class Head:
    """The head of a run's page."""

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        parts = ("name", "state", "progress", "note", "failure", "verdict")
        self.outputs: list[Any] = [markup(elem_id=f"run-{part}") for part in parts]

    def updates(self, run: Run | None, choices: CurveOptions) -> list[Update]:
        """Returns how a run is shown."""
        if run is None:
            return [""] * len(self.outputs)
        return [
            f"<h1>{escaped(run.name)}</h1>",
            self._state(run),
            self._progress(run),
            self._note(run),
            self._failure(run),
            self._verdict(run),
        ]

    def _state(self, run: Run) -> str:
        t, status = self.t, run.status
        words = ", ".join(filter(None, [phase_text(run, t), phase_progress(run, t)[0]]))
        if run.waiting:
            place = self.studio.queue.place(run)
            words = t("run.place", place=place or 1, all=len(self.studio.queue.order()))
        elif status.state == "queued":
            words = t("run.not_started")
        elif run.is_sweep and not run.active:
            words = best_trial(run, t) or phase_text(run, t)
        elif status.state in ("stopped", "crashed", "failed") and status.step:
            immediately = status.phase == "stopped at once"
            name = "stopped_at_once" if immediately else f"{status.state}_at"
            words = t(f"run.{name}", step=status.step)
        elif status.state == "finished":
            words = self._outcome(run)
        return render("run.state", t, badge=state_badge(run, t), words=words)

    def _outcome(self, run: Run) -> str:
        t, (before, after) = self.t, validation_losses(run)
        if after is None:
            return t("run.outcome_none")
        if before is None:
            return t("run.outcome_plain", after=format_metric(after, t))
        return t("run.outcome_loss", before=format_metric(before, t), after=format_metric(after, t))

    def _progress(self, run: Run) -> str:
        t, status, done = self.t, run.status, percent_done(run)
        facts = []
        if run.is_sweep:
            if status.total_steps:
                facts.append(t("run.trials_done", n=status.step, of=status.total_steps))
        elif status.total_steps and done is not None:
            facts.append(t("run.step_of", step=status.step, total=status.total_steps))
        elif status.step:
            facts.append(t("run.step", step=status.step))
        if done is not None:
            facts.append(render("run.percent", t, done=done))
        seconds = read_json_object(run.folder.result).get("seconds")
        if status.state == "finished" and isinstance(seconds, (int, float)):
            facts.append(t("run.took", time=format_duration(seconds, t)))
        elif left := time_left(run, t):
            facts.append(left)
        share = phase_progress(run, t)[1] if done is None and run.active else None
        known = done is not None or share is not None or not run.active
        kind = "worse" if finished_worse(run) else status.state if known else "unknown"
        title = t(f"run.state_{status.state}") if done is None else t("run.percent", percent=done)
        return render(
            "run.progress",
            t,
            title=f"{title} - {run.name}",
            facts=facts,
            kind=kind,
            percent=share if done is None else done,
        )

    def _note(self, run: Run) -> str:
        t, facts = self.t, run.metadata
        if run.waiting:
            text = t("run.waits")
        elif run.active and facts.kill_asked:
            text = t("run.killing", seconds=round(GRACE_SECONDS))
        elif run.active and facts.stop_asked:
            # In tens, so that the sentence is not read out every second.
            asked = (time.time() - facts.stop_asked) // 10 * 10
            text = t("run.stopping_since", time=format_duration(asked, t))
        elif run.active:
            text = t("run.close_tab")
        elif facts.out_of_time and run.status.state == "stopped":
            minutes = self.studio.settings.limits.minutes or 0
            text = t("run.out_of_time", minutes=f"{minutes:g}")
        else:
            return ""
        return message("note", text, t, role="")

    def _failure(self, run: Run) -> str:
        found = find_failure(run)
        return render("run.failure", self.t, found=found, report=report(run)) if found else ""

    def _verdict(self, run: Run) -> str:
        """Returns that the model is worse than before training, and what helps."""
        t, found = self.t, find_loss_increase(run, metrics_of(run.folder.metrics))
        if found is None:
            return ""
        name = "worse_so_far" if run.active else "worse"
        loss, before = t(f"run.{found.metric}"), format_number(found.before, t)
        title = t(f"run.{name}", loss=loss, before=before, after=format_metric(found.after, t))
        advice = t("run.worse_advice")
        if found.rate:
            lower = format_number(found.rate / 10, t)
            advice = t("run.worse_rate", rate=format_number(found.rate, t), lower=lower)
        url = t.url("new", **{"from": run.id}) + "#method"
        return render("run.verdict", t, title=title, advice=advice, url=url)
