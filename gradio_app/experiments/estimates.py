"""Estimates of training size and duration, by earlier runs or the speed of this machine."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from gradio_app.experiments.summaries import Summaries, kind_of
from gradio_app.recipe.content import count_at, value_at
from gradio_app.runs.files import number, read_json_object
from gradio_app.runs.metrics import metrics_of
from gradio_app.runs.types import Run

# So many runs are looked at, the newest first.
MOST_RUNS = 10
# The side of the matrices whose products are timed, and for how many seconds.
_SIDE, _SECONDS = 1024, 0.5
# Steps of SmolLM2 in bf16-mixed took 1 to 2 times the processor time of as many operations of
# float32 products with LoRA, and 4 to 5 times with QLoRA. Processors with fast bfloat16 may take
# half, short batches more. A run loads, validates and saves besides.
_FASTEST, _SLOWEST, _SLOWEST_QLORA = 0.5, 3.0, 6.0
_LEAST_BESIDES, _MOST_BESIDES = 10.0, 240.0


@dataclass(frozen=True)
class Work:
    """What a run reads over all epochs, and of the tokens those that are trained.

    0 tokens where rows have none, and 0 trained ones where that is not counted.
    """

    rows: float
    tokens: float
    trained: float = 0


@dataclass(frozen=True)
class Duration:
    """Between how many seconds a run takes, by so many earlier runs; 0 for a calculation."""

    low: float
    high: float
    runs: int


def planned_work(content: dict[str, Any], numbers: dict[str, Any]) -> Work | None:
    """Returns the work of a recipe, by the numbers of its data.

    ``None`` where it has no end, or a setting is not a number that can be counted with. A time
    limit is not looked at.
    """
    train = numbers.get("splits", {}).get("train", {})
    epochs = value_at(content, "trainer.max_epochs", None)
    steps = value_at(content, "trainer.max_steps", -1)
    ended = isinstance(steps, int) and steps > 0
    if not train.get("rows") or not (ended or isinstance(epochs, int) and epochs > 0):
        return None
    size = count_at(content, "data.init_args.batch_size", 8)
    accumulated = count_at(content, "trainer.accumulate_grad_batches", 1)
    limit = value_at(content, "trainer.limit_train_batches", None)
    if size is None or accumulated is None or not isinstance(limit, (int, float, type(None))):
        return None
    rows = train["rows"]
    if value_at(content, "data.init_args.packing", None):
        rows = numbers.get("packing", {}).get("rows") or rows
    batches = math.ceil(rows / size)
    used = batches if limit is None else limit * batches if isinstance(limit, float) else limit
    used = max(1, min(int(used), batches))
    each = math.ceil(used / accumulated)
    passes = epochs if isinstance(epochs, int) and epochs > 0 else math.inf
    passes = min(passes, steps / each) if ended else passes
    share = passes * used / batches
    counts = [train["rows"], train.get("tokens", 0), train.get("trained_tokens", 0)]
    return Work(*(share * count for count in counts))


def expected_duration(
    content: dict[str, Any], work: Work, runs: Iterable[Run], summaries: Summaries
) -> Duration | None:
    """Returns how long some work takes; ``None`` before a run of the same kind was timed.

    Of that kind are runs of the same task and model with the same method in the same precision on
    the same devices. Their slowest and fastest tenth of steps are the range, up to the recipe's
    time limit; what they took besides is added to it.
    """
    kind, most = kind_of(content), _most_seconds(content)
    ranges: list[tuple[float, float]] = []
    for run in runs:
        if len(ranges) == MOST_RUNS:
            break
        if run.active or summaries.of(run).kind != kind:
            continue
        unit, amount = ("tokens", work.tokens) if work.tokens else ("rows", work.rows)
        curve = metrics_of(run.folder.metrics).curve(f"{unit}_per_second")
        rates = sorted(rate for _, rate in curve if rate > 0 and math.isfinite(rate))
        if rates:
            slow, middle, fast = (rates[int(share * (len(rates) - 1))] for share in (0.1, 0.5, 0.9))
            besides = _besides(run, unit, middle)
            low, high = (besides + min(amount / rate, most) for rate in (fast, slow))
            ranges.append((low, high))
    if not ranges:
        return None
    return Duration(min(low for low, _ in ranges), max(high for _, high in ranges), len(ranges))


def calculated_duration(
    content: dict[str, Any], work: Work, plan: dict[str, Any]
) -> Duration | None:
    """Returns how long some work takes on the processor; ``None`` where it has no tokens.

    ``plan`` are the numbers of ``plan --json``. A token takes 2 operations for each parameter in
    the forward pass, as many for the gradients of what the frozen layers got, and again 2 with
    gradient checkpointing. At most every row is as long as the longest.
    """
    if not work.tokens:
        return None
    passes = 3 if plan["run"]["gradient_checkpointing"] else 2
    each, most = 2 * passes * plan["total_parameters"], _most_seconds(content)
    padded = max(work.tokens, min(work.rows * plan["run"]["seq_len"], 2 * work.tokens))
    fastest, usual = _processor_speeds()
    slowest = _SLOWEST_QLORA if plan["run"]["method"] == "qlora" else _SLOWEST
    low = min(_FASTEST * work.tokens * each / fastest, most)
    high = min(slowest * padded * each / usual, most)
    return Duration(_LEAST_BESIDES + low, _MOST_BESIDES + high, 0)


def _processor_speeds() -> tuple[float, float]:
    """Returns operations per second of products of float32 matrices: the fastest, and the mean."""
    factor = np.ones((_SIDE, _SIDE), np.float32)
    seconds: list[float] = []
    while sum(seconds) < _SECONDS:
        begun = time.perf_counter()
        factor @ factor
        seconds.append(time.perf_counter() - begun)
    return 2 * _SIDE**3 / min(seconds), 2 * _SIDE**3 * len(seconds) / sum(seconds)


def _most_seconds(content: dict[str, Any]) -> float:
    """Returns the time limit of a recipe, such as ``00:08:00:00``: days, hours and so on."""
    limit = value_at(content, "trainer.max_time", None)
    if isinstance(limit, str) and re.fullmatch(r"\d+(:\d+){3}", limit):
        limit = dict(zip(("days", "hours", "minutes", "seconds"), limit.split(":"), strict=True))
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        units = {name: float(number) for name, number in dict(limit or {}).items()}
        return timedelta(**units).total_seconds() or math.inf
    return math.inf


def _besides(run: Run, unit: str, rate: float) -> float:
    """Returns the seconds of a run in which it did not train: loading, validation, saving."""
    result = read_json_object(run.folder.result)
    seconds, amount = number(result.get("seconds")), number(result.get(unit))
    return max(0.0, seconds - amount / rate) if seconds and amount else 0.0
