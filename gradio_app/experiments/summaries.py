"""One-line summaries of runs."""

from __future__ import annotations

import contextlib
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from gradio_app.errors import UserError
from gradio_app.recipe.content import class_name, data_of, value_at
from gradio_app.recipe.fields import BY_PATH
from gradio_app.recipe.form import display_value, method_of
from gradio_app.recipe.presets import DEMO_BASE
from gradio_app.recipe.yaml_text import parse_yaml
from gradio_app.redaction import short_name
from gradio_app.runs.metrics import Metrics, metrics_of
from gradio_app.runs.outcomes import outcome_of
from gradio_app.runs.run_task import task_of_run
from gradio_app.runs.types import Run
from lightning_peft.task_registry import task_of_config

KEY_SETTINGS = (
    "trainer.strategy.init_args.r",
    "model.init_args.learning_rate",
    "data.init_args.batch_size",
    "trainer.accumulate_grad_batches",
    "trainer.max_epochs",
    "trainer.max_steps",
)
_METHOD = re.compile(r"lightning_peft\.(QLoRA|LoRA)Strategy")
_MOST_RUNS = 5_000


@dataclass(frozen=True)
class Summary:
    """A run in a line; texts are empty where they are unknown.

    Attributes:
        task: Name of the task.
        method: Its method.
        model: Last name of the base's place, or :data:`DEMO_BASE`.
        data: Last name of the data's place.
        settings: Paths and values of :data:`KEY_SETTINGS` in the recipe.
        metric: What ``best`` is a value of: the task's own, else the training loss.
        best: The best value after training has begun; of the training loss, the last one.
        mode: ``"min"`` or ``"max"``, the better value of the metric.
        seconds: How long it has trained, in all sessions.
        memory: Peak memory in bytes.
        kind: See :func:`kind_of`.
    """

    task: str = ""
    method: str = ""
    model: str = ""
    data: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    metric: str = ""
    best: float | None = None
    mode: str = "min"
    seconds: float | None = None
    memory: float | None = None
    kind: tuple[str, ...] = ()


class Summaries:
    """Summaries of runs; files are read again only when they have changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, Summary]] = {}

    def of(self, run: Run) -> Summary:
        """Returns the summary of a run as it is now."""
        folder = run.folder
        files = (folder.recipe, folder.provenance, folder.result, folder.metrics, folder.trials)
        stamp = (run.status.updated, run.status.started, *map(_stamp, files))
        known = self._known.get(run.id)
        if known is None or known[0] != stamp:
            if len(self._known) >= _MOST_RUNS:
                self._known.clear()
            known = self._known[run.id] = (stamp, summarize(run, metrics_of(folder.metrics)))
        return known[1]


def _stamp(file: Any) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(file)
        return found.st_mtime_ns, found.st_size
    return None


def summarize(run: Run, metrics: Metrics) -> Summary:
    """Returns the summary of a run."""
    content = _content(run)
    task, outcome = task_of_config(content) or task_of_run(run), outcome_of(run, metrics)
    name, mode = task.metric if task is not None else ("val_loss", "min")
    # The base before training is not a result.
    values = [value for step, value in metrics.curve(name) if step and math.isfinite(value)]
    if not values and name in outcome.after:
        values = [outcome.after[name]]
    best = (min(values) if mode == "min" else max(values)) if values else None
    if best is None:
        name, mode = "train_loss", "min"
        best = next((value for _, value in reversed(metrics.curve(name))), None)
    model = str(value_at(content, "model.init_args.model", None) or "")
    method = _METHOD.fullmatch(str(value_at(content, "trainer.strategy.class_path", "")))
    return Summary(
        task=task.name if task is not None else "",
        method=method.group(1) if method else "",
        model=model if model == DEMO_BASE else short_name(model),
        data=short_name(data_of(content)),
        settings=_settings(content),
        metric=name,
        best=best,
        mode=mode,
        seconds=outcome.seconds,
        memory=outcome.memory,
        kind=kind_of(content),
    )


def kind_of(content: dict[str, Any]) -> tuple[str, ...]:
    """Returns task, model, precision, method and devices: runs that share them are equally fast."""
    task = task_of_config(content)
    return (
        task.name if task is not None else class_name(content.get("model")),
        str(value_at(content, "model.init_args.model", None)),
        str(value_at(content, "trainer.precision", None) or "32-true"),
        method_of(content),
        str(value_at(content, "trainer.accelerator", None) or "auto"),
        str(value_at(content, "trainer.devices", None) or "auto"),
    )


def _content(run: Run) -> dict[str, Any]:
    try:
        return parse_yaml(run.redactor.portable(run.recipe_text))
    except UserError:
        return {}


def _settings(content: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    given = [(path, value_at(content, path, None)) for path in KEY_SETTINGS]
    # -1 and an empty text stand for values that are not set.
    return tuple(
        (path, str(display_value(BY_PATH[path], content)))
        for path, value in given
        if isinstance(value, (int, float, str)) and value not in (-1, "")
    )
