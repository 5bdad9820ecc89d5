"""The state of a run in words and signs, for every page that shows runs."""

from __future__ import annotations

import re
import time

from markupsafe import Markup

from gradio_app.guards import escaped
from gradio_app.runs.formatting import format_duration
from gradio_app.runs.loss_increase import finished_worse
from gradio_app.runs.types import Run
from gradio_app.texts import Texts

# Next to the word, never instead of it.
STATE_ICONS = {
    "queued": "\u25cb",
    "preparing": "\u25cc",
    "running": "\u25cf",
    "stopping": "\u25d0",
    "stopped": "\u25a0",
    "finished": "\u2713",
    "failed": "\u2715",
    "crashed": "\u26a0",
    "worse": "\u26a0",
}


def state_badge(run: Run, t: Texts) -> Markup:
    """Returns the HTML of a run's state."""
    state: str = run.status.state if run.status.state in STATE_ICONS else "failed"
    if finished_worse(run):
        state = "worse"
    return Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>').format(
        state, STATE_ICONS[state], t(f"run.state_{state}")
    )


def phase_text(run: Run, t: Texts) -> str:
    """Returns as text what a run is doing."""
    said = "crashed" if run.status.state == "crashed" else str(run.status.phase)
    key = "run.phase_" + re.sub(r"[^a-z]+", "-", said.lower()).strip("-")
    return t(key) if t.has(key) else said


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


def escaped_name(run: Run) -> str:
    """Returns the name of a run as HTML."""
    return escaped(run.name)
