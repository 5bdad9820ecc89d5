"""The tables of the record of ``run.py``; where there is none, they say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from record import format_conditions, markdown

NOT_MEASURED = "Not measured: there is no record of a GPU yet (`python benchmarks/gpu/run.py`)."
_MB = 1e6


def lines(record: Mapping[str, Any]) -> list[str]:
    """Returns all tables; ``record`` may lack any part and any row."""
    parts: dict[str, Any] = record.get("parts", {})
    measured = {name: rows for name, rows in parts.items() if name != "predictions"}
    if record.get("device") != "cuda" or not any(measured.values()):
        return [NOT_MEASURED]
    found = [format_conditions(record["conditions"])]
    for title, header, rows in (
        (
            "Training steps, batch of one row, adapters of rank 16 on all linear layers:",
            "configuration | ours, ms | PEFT + bitsandbytes, ms | ratio | tokens per second | "
            "peak GB | its peak GB",
            _steps(parts),
        ),
        (
            "Predicted and measured peaks of torch's allocator:",
            "configuration | predicted GB | measured GB | off | reserved GB | of the card GB",
            _peaks(parts, record),
        ),
        (
            "Whole trainers as they are by default:",
            "case | ms per step | tokens per second | peak GB",
            _peers(parts),
        ),
        (
            "A step of the optimizer on 448 tensors:",
            "optimizer | ms | states MB | paged MB",
            _optimizers(parts),
        ),
        (
            "The fused layer against the same operations one by one:",
            "layer | largest relative difference",
            _numbers(parts, "agreement", "worst", "{:.1e}"),
        ),
        ("Loading from disk:", "way | seconds | peak GB", _loading(parts)),
    ):
        if rows:
            found += ["", title, "", *markdown(header, rows)]
    found += _sentences(parts)
    left = [
        f"{part}, {name}: {row.get('skipped') or row.get('failed') or row['absent']}"
        for part, rows in parts.items()
        for name, row in rows.items()
        if {"skipped", "failed", "absent"} & row.keys()
    ]
    return [*found, *(["", "Not measured:", "", *(f"- {line}" for line in left)] if left else [])]


def _rows(parts: Mapping[str, Any], part: str, key: str) -> dict[str, Any]:
    return {name: row for name, row in parts.get(part, {}).items() if key in row}


def _gb(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key] / 1e9:.2f}" if key in row else "-"


def _pace(row: Mapping[str, Any]) -> tuple[str, str]:
    middle = row["seconds"]["median"]
    return f"{1e3 * middle:,.1f}", f"{row['tokens'] / middle:,.0f}"


def _steps(parts: Mapping[str, Any]) -> list[list[str]]:
    rows = {n: r for n, r in _rows(parts, "steps", "seconds").items() if "tokens" in r}
    made = []
    for name, mine in rows.items():
        configuration, _, way = name.rpartition(": ")
        if way != "ours":
            continue
        ms, pace = _pace(mine)
        other = rows.get(f"{configuration}: PEFT + bitsandbytes")
        theirs = ratio = peak = "-"
        if other is not None:
            theirs, _ = _pace(other)
            ratio = f"{mine['seconds']['median'] / other['seconds']['median']:.2f}"
            peak = _gb(other, "allocated")
        made.append([configuration, ms, theirs, ratio, pace, _gb(mine, "allocated"), peak])
    return made


def _peaks(parts: Mapping[str, Any], record: Mapping[str, Any]) -> list[list[str]]:
    from lightning_peft.plan.margins import WORKSPACE_BYTES

    capability = float(record["conditions"].get("capability", 0))
    made = []
    for name, plan in _rows(parts, "predictions", "allocated").items():
        row = parts.get("steps", {}).get(f"{name}: ours", {})
        if "allocated" in row:
            # What torch's allocator counts too.
            planned = plan["allocated"] + WORKSPACE_BYTES[capability >= 9]
            off = planned / row["allocated"] - 1
            cells = [f"{planned / 1e9:.2f}", _gb(row, "allocated"), f"{off:+.1%}"]
            made.append([name, *cells, _gb(row, "reserved"), _gb(row, "card")])
    return made


def _peers(parts: Mapping[str, Any]) -> list[list[str]]:
    found = _rows(parts, "peers", "seconds")
    return [[name, *_pace(row), _gb(row, "allocated")] for name, row in found.items()]


def _optimizers(parts: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{1e3 * row['seconds']:.2f}",
            *(f"{row[k] / _MB:,.0f}" for k in ("bytes", "paged_bytes")),
        ]
        for name, row in _rows(parts, "optimizers", "seconds").items()
    ]


def _numbers(parts: Mapping[str, Any], part: str, key: str, form: str) -> list[list[str]]:
    return [[name, form.format(row[key])] for name, row in _rows(parts, part, key).items()]


def _loading(parts: Mapping[str, Any]) -> list[list[str]]:
    found = _rows(parts, "loading", "seconds")
    return [[name, f"{row['seconds']:.1f}", _gb(row, "allocated")] for name, row in found.items()]


def _sentences(parts: Mapping[str, Any]) -> list[str]:
    """What is one number, or a few."""
    found = []
    ceilings = parts.get("ceilings", {})
    if "bytes_per_second" in ceilings.get("copy", {}) and "flops" in ceilings.get("product", {}):
        copy, product = ceilings["copy"]["bytes_per_second"], ceilings["product"]["flops"]
        found.append(f"Ceilings: {copy / 1e12:.2f} TB/s, {product / 1e12:.0f} TFLOP/s in bfloat16.")
    calls = parts.get("waits", {}).get("one step", {}).get("calls")
    if calls is not None:
        waits = sum(count for name, count in calls.items() if "Synchronize" in name)
        launches = sum(count for name, count in calls.items() if "Launch" in name)
        found.append(f"A step of 1B QLoRA launches {launches:,} kernels and waits {waits:,} times.")
    tests = parts.get("tests", {}).get("pytest -m gpu", {})
    if "code" in tests:
        found.append(f"Tests marked `gpu`: {(tests['last'] or ['no output'])[-1].strip('= ')}.")
    paging = parts.get("paging", {}).get("states beyond the card", {})
    if "same" in paging:
        same = "the same steps" if paging["same"] else "OTHER STEPS"
        times = paging["paged_seconds"] / paging["seconds"]
        found.append(f"Paged states that do not fit: {same}, {times:.1f} times the time.")
    return [line for sentence in found for line in ("", sentence)]
