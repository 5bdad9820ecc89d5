"""The state of a run, from its own status, its process and the queue."""

from __future__ import annotations

import time
from dataclasses import replace

from gradio_app.runs.metadata import RunMetadata
from gradio_app.runs.types import Executor
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import Status

# A run is said to be launched just before its process is there.
_LAUNCHING_SECONDS = 3.0


def derive_status(folder: RunFolder, metadata: RunMetadata, executor: Executor) -> Status:
    """Returns the status of a run.

    ``status.json`` is of the last process that wrote it. One that waits, or was just
    started, has not written it yet.
    """
    written = executor.status(folder)
    if metadata.waiting is not None:
        before = written or Status()
        return replace(before, state="queued", phase="waiting in line", eta_seconds=None)
    if metadata.launched is None:
        return written or Status(state="queued", phase="not started")
    if written is None or written.started < metadata.launched:
        return _unwritten_status(folder, metadata, executor)
    if metadata.resume and not written.step:
        # A resumed run counts from its checkpoint once its first step is done.
        written = replace(written, step=metadata.from_step)
    if written.state == "crashed" and (metadata.kill_asked or metadata.stop_asked):
        return replace(written, state="stopped", phase="stopped at once")
    return written


def _unwritten_status(folder: RunFolder, metadata: RunMetadata, executor: Executor) -> Status:
    """Returns the status of a run whose process has not written its status."""
    assert metadata.launched is not None
    here = Status(step=metadata.from_step, started=metadata.launched, updated=metadata.launched)
    launching = time.time() - metadata.launched < _LAUNCHING_SECONDS
    if executor.in_progress(folder) or (launching and not metadata.kill_asked):
        return replace(here, state="preparing", phase="starting")
    if metadata.kill_asked or metadata.stop_asked:
        return replace(here, state="stopped", phase="stopped at once")
    return replace(here, state="failed", phase="failed before it began")
