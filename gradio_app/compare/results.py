"""Loss curves and sample answers of several runs, and whether they are comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from gradio_app.runs.curves import downsample, finite_points
from gradio_app.runs.files import object_below, read_json_object, read_rows
from gradio_app.runs.metrics import Metrics
from gradio_app.runs.types import Run

LOSSES = ("train_loss", "val_loss")
AXES = ("step", "minutes")
# Times are read with the rows, of a very long run those of its end only.
_MOST_BYTES = 20_000_000
MAX_ROWS = 12
# What distinguishes bases without checksums; of a GGUF file, the hash of its bytes.
_IDENTITY = ("name_or_path", "revision", "gguf_sha256")


def loss_curve(metrics: Metrics, loss: str, axis: str) -> list[tuple[float, float]]:
    """Returns the points of a curve, few enough to be drawn.

    In minutes a pause of the run counts too, and points whose time is not known are left out.
    """
    points = downsample(finite_points(metrics.curve(loss)))
    if axis == "step":
        return [(float(step), value) for step, value in points]
    times = _times(metrics)
    begin = min(times.values(), default=0.0)
    return [((times[step] - begin) / 60, value) for step, value in points if step in times]


def _times(metrics: Metrics) -> dict[float, float]:
    found: dict[float, float] = {}
    for row in read_rows(metrics.file, _MOST_BYTES):
        step, moment = row.get("step"), row.get("time")
        if isinstance(step, int) and isinstance(moment, (int, float)):
            found[step] = float(moment)
    return found


@dataclass(frozen=True)
class AnswerComparison:
    """The answer of each run to one prompt, ``None`` for a run without it, and the expected one."""

    prompt: str
    expected: str
    answers: tuple[str | None, ...]


def compare_answers(runs: Sequence[Run]) -> list[AnswerComparison]:
    """Returns the prompts that more than one run has; those of most runs come first."""
    asked: dict[str, str] = {}
    answers: list[dict[str, str]] = []
    for run in runs:
        rows = [row for row in read_rows(run.folder.samples) if isinstance(row.get("step"), int)]
        last = max((row["step"] for row in rows), default=0)
        said = {}
        for row in rows:
            if row["step"] == last and "prompt" in row:
                said[str(row["prompt"])] = str(row.get("generated", ""))
                asked.setdefault(str(row["prompt"]), str(row.get("expected", "")))
        answers.append(said)
    found = [
        AnswerComparison(prompt, expected, tuple(said.get(prompt) for said in answers))
        for prompt, expected in asked.items()
    ]
    shared = [one for one in found if len(runs) - one.answers.count(None) > 1]
    return sorted(shared, key=lambda one: one.answers.count(None))[:MAX_ROWS]


def comparable(runs: Sequence[Run]) -> bool:
    """Whether losses of runs can be ranked: of the same base, on the same validation rows."""
    bases = [read_json_object(run.folder.provenance, "base") for run in runs]
    parts = [{name: object_below(base, name) for name in base} for base in bases]
    same = all(_same_base(parts[0], other) for other in parts)
    return same and same_validation_rows(runs)


def _same_base(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs began with the same weights; ``False`` also where that is not known."""
    if not one or one.keys() != other.keys():
        return False
    for mine, others in zip(one.values(), (other[name] for name in one), strict=True):
        sums = [part.get("fingerprint") for part in (mine, others)]
        # They are of all parameters but those that the adapter's files hold themselves.
        if None in sums or mine.get("left_out") != others.get("left_out"):
            named = mine.get("name_or_path")
            same = named and all(mine.get(key) == others.get(key) for key in _IDENTITY)
        else:
            same = sums[0] == sums[1]
        if not same:
            return False
    return True


def same_validation_rows(runs: Sequence[Run]) -> bool:
    """Whether runs were validated on the same rows, as the same tokens.

    ``False`` also where that is not known, such as before a run has read its data.
    """
    seen = [_validation_rows(run) for run in runs]
    return None not in seen and all(one == seen[0] for one in seen)


def _validation_rows(run: Run) -> tuple[Any, ...] | None:
    data = read_json_object(run.folder.provenance, "data")
    splits = data.get("splits")
    if not data:
        return None
    if not splits or not isinstance(splits, dict):
        # A data module of somebody else: all that is known of it.
        return (data, _limit(run))
    encoding = object_below(data, "settings", "encoding")
    how = {name: encoding.get(name) for name in ("tokenizer", "chat_template", "loss_on")}
    name = str(data.get("data", "")).replace("\\", "/").rpartition("/")[2]
    rows = (name, data.get("rows"), data.get("split_by"), splits.get("validation"))
    return (*rows, how, encoding.get("system_prompt"), _limit(run))


def _limit(run: Run) -> Any:
    """Returns how many of the validation batches are looked at."""
    try:
        recipe = yaml.safe_load(run.recipe_text)
        return recipe["trainer"].get("limit_val_batches")
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None
