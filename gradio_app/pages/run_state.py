"""Labels and icons of run states."""

from __future__ import annotations

import re
import time

from gradio_app.pages.templating import render
from gradio_app.runs.formatting import format_duration
from gradio_app.runs.loss_increase import finished_worse
from gradio_app.runs.types import Checkpoint, Run
from gradio_app.texts import Texts


def state_badge(run: Run, t: Texts) -> str:
    """Returns the HTML of a run's state."""
    state: str = run.status.state if t.has(f"run.state_{run.status.state}") else "failed"
    if finished_worse(run):
        state = "worse"
    return render("parts.badge", t, state=state, word=t(f"run.state_{state}"))


def checkpoint_label(one: Checkpoint, t: Texts, short: bool = False) -> str:
    """Returns name and step of a checkpoint; if short, its name only where the step is unknown."""
    key = "run.step" if short else "run.checkpoint"
    return one.name if one.step is None else t(key, name=one.name, step=one.step)


def phase_text(run: Run, t: Texts) -> str:
    """Returns as text what a run is doing."""
    phase = "crashed" if run.status.state == "crashed" else str(run.status.phase)
    key = "run.phase_" + re.sub(r"[^a-z]+", "-", phase.lower()).strip("-")
    return t(key) if t.has(key) else phase


def percent_done(run: Run) -> int | None:
    """Returns how much of a run's steps are done, where that is known."""
    total = run.status.total_steps
    if run.status.state == "finished":
        return 100
    if not isinstance(total, int) or total < 1 or run.status.state in ("queued", "preparing"):
        return None
    # All steps done is not yet the end.
    return min(99, int(100 * run.status.step / total))


def phase_progress(run: Run, t: Texts) -> tuple[str, int | None]:
    """Returns in words how far a phase in parts is, and in percent; nothing for other phases."""
    found = run.status.part if run.active else None
    if not isinstance(found, dict) or not t.has(f"run.part_{found.get('unit')}"):
        return "", None
    done, of = found.get("done"), found.get("of")
    if not isinstance(done, int) or not isinstance(of, int) or not 0 <= done <= of or not of:
        return "", None
    # The one that is at work, until all are done.
    words = t(f"run.part_{found['unit']}", n=min(done + 1, of), of=of)
    return words, int(100 * done / of)


def time_left(run: Run, t: Texts, now: float | None = None) -> str:
    """Returns in words how long a run still takes; empty where that is not known.

    Between two reports of the run the time goes on; where it takes longer than was thought, nothing
    is said until it reports again.
    """
    status = run.status
    if status.state != "running" or not isinstance(status.eta_seconds, (int, float)):
        return ""
    passed = (time.time() if now is None else now) - (status.eta_at or status.updated)
    seconds = status.eta_seconds - max(0.0, passed)
    return t("run.left", time=format_duration(seconds, t)) if seconds > 0 else ""
