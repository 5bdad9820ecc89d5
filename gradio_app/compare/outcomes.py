"""What came of runs: metrics before and after, time, memory, and how much was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradio_app.runs.files import read_json_object
from gradio_app.runs.metrics import Metrics
from gradio_app.runs.types import Run


@dataclass(frozen=True)
class Outcome:
    """What came of one run; what is not known is ``None``.

    Attributes:
        before: Metrics before training.
        after: Metrics after it.
        steps: Optimizer steps.
        seconds: How long it took.
        memory: Bytes at most, on the GPU if there was one.
        trainable: Weights that were trained.
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
    before, after = _numbers(result.get("before")), _numbers(result.get("after"))
    if not after:
        validated = {
            name: metrics.curve(name) for name in metrics.curves if name.startswith("val_")
        }
        before = {name: found[0][1] for name, found in validated.items() if found[0][0] == 0}
        after = {name: found[-1][1] for name, found in validated.items()}
    memory = result.get("peak_memory")
    memory = memory if isinstance(memory, dict) else {}
    bytes_used = memory.get("cuda_bytes") or memory.get("process_bytes")
    passed = run.status.updated - run.status.started + run.status.earlier_seconds
    return Outcome(
        before=before,
        after=after,
        steps=int(_number(result.get("steps")) or run.status.step),
        seconds=_number(result.get("seconds")) or (passed if passed > 0 else None),
        memory=_number(bytes_used)
        or metrics.maximum("peak_cuda_bytes")
        or metrics.maximum("peak_process_bytes"),
        trainable=_whole(result.get("trainable_parameters")),
    )


def _numbers(found: object) -> dict[str, float]:
    if not isinstance(found, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
