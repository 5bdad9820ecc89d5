"""The state of a run in words and signs, for every page that shows runs."""

from __future__ import annotations

import re

from gradio_app.guards import escaped
from gradio_app.running.store import Run
from gradio_app.running.verdict import ended_worse
from gradio_app.running.words import duration
from gradio_app.texts import Texts

# Beside the word, never instead of it.
SIGNS = {
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


def badge(run: Run, t: Texts) -> str:
    """Returns the HTML of a run's state."""
    state: str = run.status.state if run.status.state in SIGNS else "failed"
    if ended_worse(run):
        state = "worse"
    return (
        f'<span class="badge {state}"><span aria-hidden="true">{SIGNS[state]}</span> '
        f"{t(f'run.state_{state}')}</span>"
    )


def phase(run: Run, t: Texts) -> str:
    """Returns as text what a run is doing."""
    said = "crashed" if run.status.state == "crashed" else str(run.status.phase)
    key = "run.phase_" + re.sub(r"[^a-z]+", "-", said.lower()).strip("-")
    return t(key) if t.has(key) else said


def percent(run: Run) -> int | None:
    """Returns how much of a run's steps are done, where that is known."""
    total = run.status.total_steps
    if run.status.state == "finished":
        return 100
    if not isinstance(total, int) or total < 1 or run.status.state in ("queued", "preparing"):
        return None
    # All steps done is not yet the end.
    return min(99, int(100 * run.status.step / total))


def left(run: Run, t: Texts) -> str:
    """Returns in words how long a run still takes; empty where that is not known."""
    seconds = run.status.eta_seconds
    going = run.status.state == "running" and isinstance(seconds, (int, float))
    return t("run.left", time=duration(seconds or 0, t)) if going else ""


def name_of(run: Run) -> str:
    """Returns the name of a run as HTML."""
    return escaped(run.name)
