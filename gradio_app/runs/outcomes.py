"""Results of a run: metrics, duration and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradio_app.runs.files import number, object_below, read_json_object
from gradio_app.runs.metrics import Metrics
from gradio_app.runs.types import Run


@dataclass(frozen=True)
class Outcome:
    """Metrics before and after one run, its time, and its peak memory in bytes, if known.

    Memory is that of the GPU if there was one.
    """

    before: dict[str, float]
    after: dict[str, float]
    steps: int | None
    seconds: float | None
    memory: float | None
    trainable: int | None


def outcome_of(run: Run, metrics: Metrics) -> Outcome:
    """Returns the outcome of a run, so far if it is active."""
    result = read_json_object(run.folder.result)
    if run.is_sweep:
        table = read_json_object(run.folder.trials)
        best = object_below(table, "best")
        result = {"after": {table.get("metric"): best.get(str(table.get("metric")))}}
    before, after = (_numbers(object_below(result, part)) for part in ("before", "after"))
    if not after:
        validated = {
            name: metrics.curve(name) for name in metrics.curves if name.startswith("val_")
        }
        before = {name: found[0][1] for name, found in validated.items() if found[0][0] == 0}
        after = {name: found[-1][1] for name, found in validated.items()}
    memory = object_below(result, "peak_memory")
    bytes_used = memory.get("cuda_bytes") or memory.get("process_bytes")
    passed = run.status.updated - run.status.started + run.status.earlier_seconds
    trainable = number(result.get("trainable_parameters"))
    return Outcome(
        before=before,
        after=after,
        steps=int(number(result.get("steps")) or run.status.step),
        seconds=number(result.get("seconds")) or (passed if passed > 0 else None),
        memory=number(bytes_used)
        or metrics.maximum("peak_cuda_bytes")
        or metrics.maximum("peak_process_bytes"),
        trainable=None if trainable is None else int(trainable),
    )


def _numbers(content: dict[str, Any]) -> dict[str, float]:
    values = {name: number(value) for name, value in content.items()}
    return {name: value for name, value in values.items() if value is not None}
