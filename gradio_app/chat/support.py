"""Whether what a run trains can be talked to at all: a classifier has no answer to give."""

from __future__ import annotations

import re

from gradio_app.runs.files import read_json_object
from gradio_app.runs.types import Run
from lightning_peft.task_registry import tasks_of_module

_IN_RECIPE = re.compile(r"^model:\n\s+class_path: (\S+)$", re.MULTILINE)


def unsupported_task(run: Run) -> str:
    """Returns the class of the task that a run trains, if it is one that cannot chat.

    Empty for one that can, and for a user's own task: its base may well be a language model, and
    loading it says whether it is.
    """
    path = read_json_object(run.folder.provenance).get("task")
    if path is None:
        # It has not begun yet.
        match = _IN_RECIPE.search(run.recipe_text)
        path = match and match[1]
    tasks = tasks_of_module(path) if isinstance(path, str) else []
    return tasks[0].class_name if tasks and not tasks[0].chats else ""
