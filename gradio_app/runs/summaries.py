"""A run in a line of a list: what it was for, and what came of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gradio_app.runs.files import read_json_object, read_rows
from gradio_app.runs.types import Run

_TASK = re.compile(r"class_path:\s*lightning_peft\.tasks\.(?:\w+\.)*([A-Z]\w+)")
_METHOD = re.compile(r"class_path:\s*lightning_peft\.(QLoRA|LoRA)Strategy")
# Callbacks live in the same package.
_NO_TASKS = {"BestCheckpoint", "StopEarly", "LogSamples"}
_TAIL_BYTES = 20_000


@dataclass(frozen=True)
class Summary:
    """A run in a line.

    Attributes:
        task: Class of the task, such as ``"CausalLM"``; empty where it is another's.
        method: ``"QLoRA"``, ``"LoRA"`` or empty.
        loss: The last validation loss, else the last training loss, if there is one.
        validated: Whether it is a validation loss.
    """

    task: str
    method: str
    loss: float | None
    validated: bool


def summary_of(run: Run) -> Summary:
    """Returns the summary of a run."""
    recipe = run.recipe_text
    tasks = [name for name in _TASK.findall(recipe) if name not in _NO_TASKS]
    method = _METHOD.search(recipe)
    loss, validated = _loss(run)
    return Summary(tasks[0] if tasks else "", method.group(1) if method else "", loss, validated)


def _loss(run: Run) -> tuple[float | None, bool]:
    after = read_json_object(run.folder.result).get("after")
    if isinstance(after, dict) and isinstance(after.get("val_loss"), (int, float)):
        return float(after["val_loss"]), True
    rows = list(read_rows(run.folder.metrics, _TAIL_BYTES))
    for name in ("val_loss", "train_loss"):
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float))]
        if values:
            return float(values[-1]), name == "val_loss"
    return None, False
