"""Harness results as one table: base, adapters and differences."""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_peft.errors import first_line
from lightning_peft.runs.integrity import run_of
from lightning_peft.runs.status import write_json

# What the harness returns for one model.
Found = Mapping[str, Any]


def table_rows(found: Mapping[str, Found]) -> list[dict[str, Any]]:
    """Returns a row for each task and metric of what was found by model, the base first.

    Rows have ``task``, ``metric``, ``filter``, ``higher_is_better`` (``None`` if unknown),
    ``samples``, and by name in ``values`` and ``differences`` a ``value`` with its ``stderr``
    (``None`` where there is none). Differences are those to the base.
    """
    base, *adapters = found
    rows = []
    for task, metrics in found[base]["results"].items():
        for key in metrics:
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            values = {name: _value(found[name], task, metric, filtered) for name in found}
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "higher_is_better": found[base]["higher_is_better"].get(task, {}).get(metric),
                    "samples": metrics.get("sample_len"),
                    "values": values,
                    "differences": {
                        name: _difference(found[base], found[name], values[base], values[name], row)
                        for row in [(task, metric, filtered)]
                        for name in adapters
                    },
                }
            )
    return rows


def task_hashes(found: Found) -> dict[str, str]:
    """Returns a hash of the rows, prompts and targets of each task, as the harness makes it."""
    return {
        task: _sha256("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        for task, samples in found["samples"].items()
    }


def save(
    report: dict[str, Any], adapters: Sequence[Path], output: str | None
) -> tuple[list[Path], list[str]]:
    """Writes a report to ``output`` and to ``evaluations/`` of each run with one of the adapters.

    Returned are the files, and why others could not be written: the report may have taken hours, so
    that one full disk does not end it.
    """
    runs = {run.path.resolve(): run for folder in adapters if (run := run_of(folder)) is not None}
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    files = [run.evaluations / f"{stamp}-{secrets.token_hex(2)}.json" for run in runs.values()]
    files += [Path(output)] if output else []
    saved, not_saved = [], []
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, report)
            saved.append(file)
        except (OSError, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            not_saved.append(f"the results cannot be written to {str(file)!r}: {reason}")
    return saved, not_saved


def _value(found: Found, task: str, metric: str, filtered: str) -> dict[str, float | None]:
    metrics = found["results"][task]
    return {
        "value": _number(metrics.get(f"{metric},{filtered}")),
        "stderr": _number(metrics.get(f"{metric}_stderr,{filtered}")),
    }


def _difference(
    base: Found,
    tuned: Found,
    before: Mapping[str, float | None],
    after: Mapping[str, float | None],
    row: tuple[str, str, str],
) -> dict[str, float | None]:
    """Returns the difference, with the standard error of the rows' own differences.

    Both answered the same rows, so that the two errors do not add up. Only means have such rows.
    """
    if before["value"] is None or after["value"] is None:
        return {"value": None, "stderr": None}
    one, other = _by_row(base, *row), _by_row(tuned, *row)
    means = (
        len(one) > 1
        and one.keys() == other.keys()
        and math.isclose(fmean(one.values()), before["value"], abs_tol=1e-9)
        and math.isclose(fmean(other.values()), after["value"], abs_tol=1e-9)
    )
    changes = [other[place] - one[place] for place in one] if means else []
    return {
        "value": after["value"] - before["value"],
        "stderr": stdev(changes) / math.sqrt(len(changes)) if changes else None,
    }


def _by_row(found: Found, task: str, metric: str, filtered: str) -> dict[int, float]:
    values = {
        sample["doc_id"]: _number(sample.get(metric))
        for sample in found["samples"].get(task, [])
        if sample["filter"] == filtered
    }
    return {} if None in values.values() else {k: v for k, v in values.items() if v is not None}


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
