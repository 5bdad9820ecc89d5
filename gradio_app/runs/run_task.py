"""Task of a run."""

from __future__ import annotations

import re

from gradio_app.runs.files import read_json_object
from gradio_app.runs.types import Run
from lightning_peft.task_registry import TaskSpec, tasks_of_module

_CLASS_PATH = re.compile(r"class_path:\s*(\S+)")


def task_of_run(run: Run) -> TaskSpec | None:
    """Returns the task that a run trains, by its record or, until it begins, by its recipe.

    ``None`` for a user's own task.
    """
    recorded = read_json_object(run.folder.provenance).get("task")
    paths = [recorded] if isinstance(recorded, str) else _CLASS_PATH.findall(run.recipe_text)
    return next((spec for path in paths for spec in tasks_of_module(path)), None)
