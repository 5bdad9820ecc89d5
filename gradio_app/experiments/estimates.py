"""How much a run trains on, and how long that takes here by what earlier runs took."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gradio_app.experiments.summaries import Summaries, kind_of
from gradio_app.recipe.content import value_at
from gradio_app.runs.files import number, read_json_object
from gradio_app.runs.types import Run

# So many runs are looked at, the newest first.
MOST_RUNS = 10


@dataclass(frozen=True)
class Work:
    """Rows and tokens that a run trains on, over all epochs; no tokens where rows have none."""

    rows: float
    tokens: float


@dataclass(frozen=True)
class Duration:
    """Between how many seconds a run takes, by so many earlier runs."""

    low: float
    high: float
    runs: int


def planned_work(content: dict[str, Any], numbers: dict[str, Any]) -> Work | None:
    """Returns the work of a recipe, by the numbers of its data; ``None`` where it has no end."""
    train = numbers.get("splits", {}).get("train", {})
    epochs = value_at(content, "trainer.max_epochs", None)
    steps = value_at(content, "trainer.max_steps", -1)
    ended = isinstance(steps, int) and steps > 0
    if not train.get("rows") or not (ended or isinstance(epochs, int) and epochs > 0):
        return None
    batches = math.ceil(train["rows"] / value_at(content, "data.init_args.batch_size", 8))
    limit = value_at(content, "trainer.limit_train_batches", None)
    used = batches if limit is None else limit * batches if isinstance(limit, float) else limit
    used = max(1, min(int(used), batches))
    each = math.ceil(used / value_at(content, "trainer.accumulate_grad_batches", 1))
    passes = epochs if isinstance(epochs, int) and epochs > 0 else math.inf
    passes = min(passes, steps / each) if ended else passes
    share = passes * used / batches
    return Work(share * train["rows"], share * train.get("tokens", 0))


def expected_duration(
    content: dict[str, Any], work: Work, runs: Iterable[Run], summaries: Summaries
) -> Duration | None:
    """Returns how long some work takes; ``None`` before a run of the same kind was timed.

    Of that kind are runs of the same model with the same method in the same precision. Their
    slowest and fastest tenth of steps are the range; what they took besides is added to it.
    """
    kind = kind_of(content)
    ranges: list[tuple[float, float]] = []
    for run in runs:
        if len(ranges) == MOST_RUNS:
            break
        if run.active or summaries.of(run).kind != kind:
            continue
        unit, amount = ("tokens", work.tokens) if work.tokens else ("rows", work.rows)
        curve = summaries.metrics(run).curve(f"{unit}_per_second")
        rates = sorted(rate for _, rate in curve if rate > 0 and math.isfinite(rate))
        if rates:
            slow, middle, fast = (rates[int(share * (len(rates) - 1))] for share in (0.1, 0.5, 0.9))
            besides = _besides(run, unit, middle)
            ranges.append((besides + amount / fast, besides + amount / slow))
    if not ranges:
        return None
    return Duration(min(low for low, _ in ranges), max(high for _, high in ranges), len(ranges))


def _besides(run: Run, unit: str, rate: float) -> float:
    """Returns the seconds of a run in which it did not train: loading, validation, saving."""
    result = read_json_object(run.folder.result)
    seconds, amount = number(result.get("seconds")), number(result.get(unit))
    return max(0.0, seconds - amount / rate) if seconds and amount else 0.0
