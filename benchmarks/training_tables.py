"""The tables of ``training_step.py``: what was measured, the losses, the ladder, its profiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from record import format_conditions, markdown, ratio_table

# Of the ladder, what each rung changes.
CHANGES = {
    "by hand": "PEFT and bitsandbytes in a loop, padded rows",
    "layers": "+ a linear layer and its adapter are one step for autograd",
    "engine": "+ the loss without float32 copies of all logits",
    "labelled": "+ logits only where there is a label",
    "packed": "+ packed rows",
    "checkpointed": "+ blocks keep their inputs only",
}


def tables(content: dict[str, Any], ladder: Sequence[str]) -> list[str]:
    """Returns all of them, under the conditions; ``ladder`` are methods of it in order."""
    cases = {entry["case"]: entry["methods"] for entry in content["cases"]}
    lines = [format_conditions(content["conditions"]), "", *_measured(cases)]
    lines += ["", "Ratios, round by round:", "", *ratio_table(content["ratios"])]
    lines += ["", *_losses(cases)]
    rungs: dict[str, Any] = cases.get("instructions", {})
    present = [name for name in ladder if "blocks" in rungs.get(name, {})]
    if present:
        lines += ["", *_ladder(rungs, present), "", *_profiles(rungs, present)]
    return lines


def _measured(cases: dict[str, Any]) -> list[str]:
    rows = []
    for case, methods in cases.items():
        for method, record in methods.items():
            if "skipped" in record:
                rows.append([case, method, f"skipped: {record['skipped']}", *[""] * 4])
                continue
            blocks = [1e3 * seconds for seconds in record["blocks"]]
            cells = [f"{ms:.1f}" for ms in (statistics.median(blocks), min(blocks), max(blocks))]
            cells += [f"{statistics.median(record['tokens']):,.0f}", f"{record['peak'] / 1e6:,.1f}"]
            rows.append([case, method, *cells])
    columns = "case | method | ms per step | from | to | tokens per second | peak MB"
    return markdown(columns, rows)


def _losses(cases: dict[str, Any]) -> list[str]:
    """The loss of each method over the second half of its steps, against the first one's."""
    lines = [
        "Loss of the first step, and mean over the second half of all steps with its standard",
        "error over their batches. Equal within noise: the mean differs from that of the case's",
        "first method by at most three standard errors of the difference.",
        "",
    ]
    rows = []
    for case, methods in cases.items():
        first: tuple[float, float] | None = None
        for method, record in methods.items():
            losses = record.get("losses", [])
            if len(losses) < 4:
                continue
            half = losses[len(losses) // 2 :]
            mean = statistics.mean(half)
            error = statistics.stdev(half) / math.sqrt(len(half))
            first = first or (mean, error)
            equal = abs(mean - first[0]) <= 3 * math.hypot(error, first[1])
            cells = [f"{losses[0]:.4f}", f"{mean:.4f}", f"{error:.4f}", "yes" if equal else "no"]
            rows.append([case, method, *cells])
    columns = "case | method | first | mean | standard error | equal within noise"
    return lines + markdown(columns, rows)


def _ladder(rungs: dict[str, Any], present: list[str]) -> list[str]:
    rows = []
    first = statistics.median(rungs[present[0]]["tokens"])
    for name in present:
        record = rungs[name]
        tokens = statistics.median(record["tokens"])
        cells = [
            name,
            CHANGES[name],
            f"{1e3 * statistics.median(record['blocks']):.1f}",
            f"{tokens:,.0f}",
            f"{record['peak'] / 1e6:,.1f}",
            f"{tokens / first:.2f}",
        ]
        rows.append(cells)
    columns = "rung | change | ms per step | tokens per second | peak MB | times the first"
    lines = ["The ladder, one change in each row, on `instructions`:", ""]
    return lines + markdown(columns, rows)


def _profiles(rungs: dict[str, Any], present: list[str]) -> list[str]:
    groups = list(rungs[present[0]]["profile"]["groups"])
    lines = [
        "Where the time of one step goes, by torch's profiler. Some 4-bit products of bitsandbytes",
        "dequantize and multiply in one operation; they count as dequantize.",
        "",
    ]
    rows = []
    for name in present:
        profile = rungs[name]["profile"]
        cells = [f"{profile['groups'][group]:.0%}" for group in groups]
        most = [f"`{op}` {share:.0%}" for op, share in list(profile["operations"].items())[:4]]
        rows.append([name, *cells, ", ".join(most)])
    return lines + markdown(f"rung | {' | '.join(groups)} | largest operations", rows)
