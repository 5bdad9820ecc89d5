"""The head of a run's page: name, state, progress, and what happened if it ended early."""

from __future__ import annotations

import time
from typing import Any

from gradio_app.guards import escaped
from gradio_app.pages.markup import markup
from gradio_app.pages.run.view import ComponentUpdate, CurveOptions, html_update
from gradio_app.pages.run_state import (
    escaped_name,
    percent_done,
    phase_progress,
    phase_text,
    state_badge,
    time_left,
)
from gradio_app.runs.failures import find_failure, report
from gradio_app.runs.files import read_json_object
from gradio_app.runs.formatting import format_duration, format_metric, format_number
from gradio_app.runs.local import GRACE_SECONDS
from gradio_app.runs.loss_increase import find_loss_increase, finished_worse
from gradio_app.runs.metrics import MetricsCache
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts


class Head:
    """The head of a run's page."""

    def __init__(self, studio: Studio, t: Texts, metrics: MetricsCache) -> None:
        self.studio, self.t, self._metrics = studio, t, metrics
        self.outputs: list[Any] = [
            markup("", elem_id="run-name"),
            markup("", elem_id="run-state"),
            markup("", elem_id="run-progress"),
            markup("", elem_id="run-note"),
            markup("", elem_id="run-failure"),
            markup("", elem_id="run-verdict"),
        ]

    def updates(self, run: Run | None, choices: CurveOptions) -> list[ComponentUpdate]:
        """Returns how a run is shown."""
        if run is None:
            return [html_update("")] * len(self.outputs)
        title = f"<h1>{escaped_name(run)}</h1>"
        return [
            html_update(title),
            html_update(self._state(run)),
            html_update(self._progress(run)),
            html_update(self._note(run)),
            html_update(self._failure(run)),
            html_update(self._verdict(run)),
        ]

    def _state(self, run: Run) -> str:
        t, status = self.t, run.status
        words = ", ".join(filter(None, [phase_text(run, t), phase_progress(run, t)[0]]))
        if run.waiting:
            place = self.studio.queue.place(run)
            words = t("run.place", place=place or 1, all=len(self.studio.queue.order()))
        elif status.state == "queued":
            words = t("run.not_started")
        elif status.state in ("stopped", "crashed", "failed") and status.step:
            immediately = status.phase == "stopped at once"
            name = "stopped_at_once" if immediately else f"{status.state}_at"
            words = t(f"run.{name}", step=status.step)
        elif status.state == "finished":
            words = self._outcome(run)
        badge = state_badge(run, t)
        return f'<p class="state" role="status">{badge} <span>{escaped(words)}</span></p>'

    def _outcome(self, run: Run) -> str:
        t, result = self.t, read_json_object(run.folder.result)
        before, after = (
            result[moment].get("val_loss") if isinstance(result.get(moment), dict) else None
            for moment in ("before", "after")
        )
        if not isinstance(after, (int, float)):
            return t("run.outcome_none")
        if not isinstance(before, (int, float)):
            return t("run.outcome_plain", after=format_metric(after, t))
        return t("run.outcome_loss", before=format_metric(before, t), after=format_metric(after, t))

    def _progress(self, run: Run) -> str:
        t, status = self.t, run.status
        done = percent_done(run)
        shown = done if done is not None else 0
        title = (
            t("run.percent", percent=done) if done is not None else t(f"run.state_{status.state}")
        )
        facts = []
        if status.total_steps and done is not None:
            facts.append(t("run.step_of", step=status.step, total=status.total_steps))
        elif status.step:
            facts.append(t("run.step", step=status.step))
        if done is not None:
            facts.append(f"<strong>{t('run.percent', percent=done)}</strong>")
        seconds = read_json_object(run.folder.result).get("seconds")
        if status.state == "finished" and isinstance(seconds, (int, float)):
            facts.append(t("run.took", time=format_duration(seconds, t)))
        elif time_left(run, t):
            facts.append(time_left(run, t))
        kind: str = "unknown" if done is None and run.active else status.state
        share = phase_progress(run, t)[1]
        if kind == "unknown" and share is not None:
            kind, done, shown = status.state, share, share
        if finished_worse(run):
            kind = "worse"
        news = escaped(f"{title} - {run.name}")
        return (
            f'<div data-title="{news}">'
            f'<p class="facts">{"".join(f"<span>{fact}</span>" for fact in facts)}</p>'
            f'<div class="bar {kind}" role="progressbar" aria-label="{t("run.progress")}" '
            f'aria-valuemin="0" aria-valuemax="100"'
            + (f' aria-valuenow="{shown}"' if done is not None else "")
            + f'><span style="width: {shown}%"></span></div></div>'
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
        return f'<p class="note">{escaped(text)}</p>'

    def _failure(self, run: Run) -> str:
        failure, t = find_failure(run), self.t
        if failure is None:
            return ""
        said = f"<pre>{escaped(failure.message)}</pre>" if failure.message else ""
        return (
            f'<section class="failure" aria-label="{t("run.why")}"><div role="alert">'
            f"<h2>{t(f'run.why_{failure.kind}')}</h2><p>{t(f'run.todo_{failure.kind}')}</p></div>"
            f"{said}<details><summary>{t('run.details')}</summary>"
            f'<pre tabindex="0">{escaped(failure.details)}</pre></details>'
            f'<button type="button" class="as-button" data-copies="{escaped(report(run))}">'
            f"{t('run.copy_report')}</button></section>"
        )

    def _verdict(self, run: Run) -> str:
        """Returns that the model is worse than before training, and what helps."""
        t, found = self.t, find_loss_increase(run, self._metrics.of(run.folder.metrics))
        if found is None:
            return ""
        name = "worse_so_far" if run.active else "worse"
        loss, before = t(f"run.{found.metric}"), format_number(found.before, t)
        title = t(f"run.{name}", loss=loss, before=before, after=format_metric(found.after, t))
        advice = t("run.worse_advice")
        if found.rate:
            rates = {
                "rate": format_number(found.rate, t),
                "lower": format_number(found.rate / 10, t),
            }
            advice = t("run.worse_rate", **rates)
        link = escaped(t.url("new", **{"from": run.id}) + "#method")
        return (
            f'<section aria-label="{t("run.verdict")}"><div class="alert" role="alert"><strong>'
            f'<span aria-hidden="true">\u26a0</span> {escaped(title)}</strong><p>{advice} '
            f'<a href="{link}">{t("run.duplicate")}</a></p></div></section>'
        )
