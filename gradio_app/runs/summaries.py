"""A run in a line of a list: what it was for, and what came of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gradio_app.runs.files import number, read_json_object, read_rows
from gradio_app.runs.loss_increase import validation_losses
from gradio_app.runs.types import Run
from lightning_peft.task_registry import TaskSpec, tasks_of_module

# The lists show many runs, and a YAML parser would take much longer.
_CLASS_PATH = re.compile(r"class_path:\s*(\S+)")
_METHOD = re.compile(r"class_path:\s*lightning_peft\.(QLoRA|LoRA)Strategy")
_TAIL_BYTES = 20_000


@dataclass(frozen=True)
class Summary:
    """A run in a line; task and method are empty where they are unknown.

    The loss is the last validation loss, else the last training loss, if there is one.
    """

    task: str
    method: str
    loss: float | None
    validated: bool


def summary_of(run: Run) -> Summary:
    """Returns the summary of a run."""
    task, method = task_of_run(run), _METHOD.search(run.recipe_text)
    name = task.class_name if task is not None else ""
    return Summary(name, method.group(1) if method else "", *_loss(run))


def task_of_run(run: Run) -> TaskSpec | None:
    """Returns the task that a run trains, by its record or, until it begins, by its recipe.

    ``None`` for a user's own task.
    """
    recorded = read_json_object(run.folder.provenance).get("task")
    paths = [recorded] if isinstance(recorded, str) else _CLASS_PATH.findall(run.recipe_text)
    return next((spec for path in paths for spec in tasks_of_module(path)), None)


def _loss(run: Run) -> tuple[float | None, bool]:
    after = validation_losses(run)[1]
    if after is not None:
        return after, True
    rows = list(read_rows(run.folder.metrics, _TAIL_BYTES))
    for name in ("val_loss", "train_loss"):
        values = [value for row in rows if (value := number(row.get(name))) is not None]
        if values:
            return values[-1], name == "val_loss"
    return None, False
