"""Whether what a run trains can be talked to at all: a classifier has no answer to give."""

from __future__ import annotations

from gradio_app.runs.summaries import task_of_run
from gradio_app.runs.types import Run


def unsupported_task(run: Run) -> str:
    """Returns the class of the task that a run trains, if it is one that cannot chat.

    Empty for one that can, and for a user's own task: its base may well be a language model, and
    loading it says whether it is.
    """
    task = task_of_run(run)
    return task.class_name if task is not None and not task.chats else ""
