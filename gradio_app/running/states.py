"""In which state a run is: what it says itself, and what its process and its place in line say."""

from __future__ import annotations

import time
from dataclasses import replace

from gradio_app.running.executors import Executor
from gradio_app.running.facts import Facts
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import Status

# A run is said to be launched just before its process is there.
_LAUNCHING_SECONDS = 3.0


def state_of(folder: RunFolder, facts: Facts, executor: Executor) -> Status:
    """Returns the status of a run.

    What ``status.json`` says is of the last process that spoke. One that waits, or was just
    started, has not spoken yet.

    Args:
        folder: Its folder.
        facts: What the page knows of it.
        executor: What it was, or will be, started by.
    """
    written = executor.status(folder)
    if facts.waiting is not None:
        before = written or Status()
        return replace(before, state="queued", phase="waiting in line", eta_seconds=None)
    if facts.launched is None:
        return written or Status(state="queued", phase="not started")
    if written is None or written.started < facts.launched:
        return _unspoken(folder, facts, executor)
    if facts.resume and not written.step:
        # A run that goes on begins to count from its checkpoint with its first step.
        written = replace(written, step=facts.from_step)
    if written.state == "crashed" and (facts.kill_asked or facts.stop_asked):
        return replace(written, state="stopped", phase="stopped at once")
    return written


def _unspoken(folder: RunFolder, facts: Facts, executor: Executor) -> Status:
    """Returns the status of a run whose process has not written its status."""
    assert facts.launched is not None
    here = Status(step=facts.from_step, started=facts.launched, updated=facts.launched)
    launching = time.time() - facts.launched < _LAUNCHING_SECONDS
    if executor.working(folder) or (launching and not facts.kill_asked):
        return replace(here, state="preparing", phase="starting")
    if facts.kill_asked or facts.stop_asked:
        return replace(here, state="stopped", phase="stopped at once")
    return replace(here, state="failed", phase="failed before it began")
