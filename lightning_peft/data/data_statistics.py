"""Statistics of prepared data: labels, lengths and duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lightning_peft.data.row_content import read_content

if TYPE_CHECKING:
    from lightning_peft.data.prepared import Prepared
    from lightning_peft.data.row_data_module import RowDataModule

BUCKETS = 8
# Longest rows that are named, and how much of each is shown, in characters.
LONGEST_ROWS = 5
_SHOWN_CHARACTERS = 160


def statistics(data: RowDataModule, prepared: Prepared, longest: int) -> dict[str, Any]:
    """Returns numbers on all of prepared data, ready for JSON, with its ``longest`` rows."""
    problems: dict[str, set[tuple[str, int]]] = {}
    for one in prepared.problems:
        problems.setdefault(one.kind, set()).add((one.file, one.row))
    splits = prepared.summary["splits"].values()
    found: dict[str, Any] = {
        "duplicates": len(problems.get("duplicate", ())) + sum(s["duplicates"] for s in splits),
        "in_two_splits": len(problems.get("leak", ())),
        "shared_prompts": prepared.summary["shared_prompts"],
        "over_long": len(problems.get("long", ())),
        **read_content(prepared.folder),
    }
    if all("tokens" in one for one in splits):
        found["tokens"] = sum(one["tokens"] for one in splits)
    labels = {split: _label_counts(data, prepared, split) for split in prepared.splits}
    if any(labels.values()):
        found["label_counts"] = labels
    found["longest_rows"] = _longest_rows(data, prepared, longest)
    return found


def _label_counts(data: RowDataModule, prepared: Prepared, split: str) -> dict[str, int]:
    counts = getattr(data, "label_counts", None)
    if counts is not None:
        found = dict(counts(split))
    else:
        rows = prepared.splits[split]
        if "label" not in rows.column_names:
            return {}
        column = rows.data.column("label")
        if not (pa.types.is_string(column.type) or pa.types.is_boolean(column.type)):
            return {}
        found = {one["values"]: one["counts"] for one in column.value_counts().to_pylist()}
    ordered = sorted(found.items(), key=lambda pair: (-pair[1], str(pair[0])))
    return {str(name): count for name, count in ordered}


def _longest_rows(data: RowDataModule, prepared: Prepared, number: int) -> list[dict[str, Any]]:
    lengths = prepared.lengths("train")
    places = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    found = []
    for place in places[:number]:
        row = prepared.splits["train"][place]
        text = "".join(span.text for span in data.render_row(row)).strip()
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}\u2026"
        found.append(
            {"file": row["file"], "row": row["row"], "length": lengths[place], "text": shown}
        )
    return found


def length_histogram(prepared: Prepared, limit: int) -> dict[str, Any]:
    """Returns mean, median, 95th percentile and longest training row, and rows by length.

    What was cut off counts in the buckets alone: those with ``cut`` are longer than ``limit``.
    """
    lengths = prepared.lengths("train")
    rows = prepared.splits["train"]
    full = lengths
    if "full_length" in rows.column_names:
        full = rows.data.column("full_length").to_pylist()
    elif "tokens_cut" in rows.column_names:
        cut = rows.data.column("tokens_cut").to_pylist()
        full = [length + more for length, more in zip(lengths, cut, strict=True)]
    kept = [length for length in full if length <= limit]
    # Up to the longest row that there is: short data in a long context is the usual case.
    buckets = _buckets(kept if len(kept) == len(full) else [*kept, limit])
    if len(kept) < len(full):
        buckets[-1]["rows"] -= 1
        last = {"from": limit + 1, "to": max(full), "rows": len(full) - len(kept), "cut": True}
        buckets = [*buckets, last]
    middle, high = np.percentile(lengths, [50, 95], method="lower")
    return {
        "mean": round(sum(lengths) / len(lengths), 1),
        "median": int(middle),
        "percentile_95": int(high),
        "longest": max(lengths),
        "buckets": buckets,
    }


def _buckets(lengths: Sequence[int]) -> list[dict[str, Any]]:
    longest = max(lengths)
    width = max(1, -(-longest // BUCKETS))
    counts = [0] * (-(-longest // width))
    for length in lengths:
        counts[(length - 1) // width] += 1
    return [
        {"from": i * width + 1, "to": min((i + 1) * width, longest), "rows": n, "cut": False}
        for i, n in enumerate(counts)
    ]
