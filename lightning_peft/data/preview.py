"""Preview and statistics of the training data, and validation without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Features, Value

from lightning_peft.data.encoding import TextSpan
from lightning_peft.data.json_text import texts_in
from lightning_peft.data.packing import PackedRows
from lightning_peft.data.prepared_parts import Prepared
from lightning_peft.data.row_content import read_content
from lightning_peft.data.row_data_module import RowDataModule
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import SHAPES, Layout
from lightning_peft.data.validation import KINDS, by_kind, row_numbers


@dataclass(frozen=True)
class PreviewedRow:
    """One row as it is trained, with its origin."""

    split: str
    file: str
    row: int
    runs: list[TextSpan]


@dataclass(frozen=True)
class Preview:
    """The first training rows, and all numbers on the data, ready for JSON."""

    rows: list[PreviewedRow]
    numbers: dict[str, Any]


def preview(data: RowDataModule, rows: int, search: str = "") -> Preview:
    """Returns a preview of training on ``data``, with its first ``rows`` in full.

    With ``search``, those in which that text occurs, and ``numbers["search"]`` says in how many.
    """
    prepared = data.read()
    summary = prepared.summary
    train = summary["splits"]["train"]
    numbers = {
        **summary,
        "data": data.hparams["data"],
        "shape": {"name": summary["shape"], "title": SHAPES[summary["shape"]].title},
        "problems": _problems(prepared),
        "statistics": statistics(data, prepared, longest=LONGEST_ROWS if rows else 0),
    }
    lengths = prepared.lengths("train")
    if lengths:
        longest = _longest_allowed(data, lengths)
        numbers["max_length"] = longest
        numbers["lengths"] = length_histogram(prepared, longest)
        size = data.batch_size
        batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        padded = sum(len(batch) * max(batch) for batch in batches)
        numbers["padding"] = {"efficiency": round(sum(lengths) / padded, 4)}
    if "tokenizer" in data.hparams:
        numbers["tokenizer"] = data.hparams["tokenizer"]
    if "trained_tokens" in train:
        numbers["trained_share"] = train["trained_tokens"] / max(1, train["tokens"])
    if "packing" in data.hparams:
        numbers["packing"] = _packing(lengths, data)
    if search:
        numbers["search"], places = _search(data, prepared, search, rows)
    else:
        places = [(split, place) for split in list(prepared.splits)[:1] for place in range(rows)]
    shown = []
    for split, place in places:
        if place < len(prepared.splits[split]):
            row = prepared.splits[split][place]
            shown.append(PreviewedRow(split, row["file"], row["row"], data.render_row(row)))
    return Preview(shown, numbers)


def _search(
    data: RowDataModule, prepared: Prepared, text: str, rows: int
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Returns in how many rows a text occurs, and the first of those that are used."""
    wanted = text.casefold()
    # Several where a row was split, or became a pair.
    places: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for split, encoded in prepared.splits.items():
        origins = encoded.select_columns(["file", "row"])
        for place, one in enumerate(origins):
            places.setdefault((one["file"], one["row"]), []).append((split, place))
    found = 0
    shown: list[tuple[str, int]] = []
    for row in data.source_rows():
        if any(wanted in one.casefold() for one in texts_in(row.value)):
            found += 1
            parts = places.get((row.file, row.number), [])
            if parts and len(shown) < rows:
                shown.append(_part_with(data, prepared, wanted, parts))
    return {"text": text, "rows": found}, shown


def _part_with(
    data: RowDataModule, prepared: Prepared, wanted: str, parts: list[tuple[str, int]]
) -> tuple[str, int]:
    """Returns the first part in which a text occurs as it is shown; else the first of all."""
    for split, place in parts if len(parts) > 1 else []:
        spans = data.render_row(prepared.splits[split][place])
        if wanted in "".join(span.text for span in spans).casefold():
            return split, place
    return parts[0]


def _longest_allowed(data: RowDataModule, lengths: Sequence[int]) -> int:
    # Lengths of recordings are hundredths of a second, and their max_length is of transcripts.
    seconds = getattr(data, "max_seconds", None)
    allowed = getattr(data, "max_length", max(lengths)) if seconds is None else round(100 * seconds)
    return int(allowed)


def _packing(lengths: Sequence[int], data: RowDataModule) -> dict[str, Any]:
    if not lengths:
        return {"rows": 0, "efficiency": 0.0}
    packed = PackedRows([], lengths, data.max_length)  # type: ignore[attr-defined]
    return {"rows": len(packed), "efficiency": round(packed.efficiency, 4)}


def _problems(prepared: Prepared) -> list[dict[str, Any]]:
    found = []
    for kind, ones in by_kind(prepared.problems).items():
        title, remedy = KINDS[kind]
        rows = [{"file": p.file, "row": p.row, "detail": p.detail} for p in ones]
        numbers = row_numbers(ones)
        entry = {"kind": kind, "title": title, "what_to_do": remedy, "numbers": numbers}
        found.append({**entry, "rows": rows})
    return found


class _NoTokens(RowEncoder):
    """Keeps nothing of a row but that it can be read."""

    features = Features({"length": Value("int32")})
    # A chat template is not known, so any of the names that templates read may be used.
    variables = frozenset()

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        return [{"length": 1}]


class CheckedRows(RowDataModule):
    """Rows of any shape, which are read and checked, and cannot be trained on."""

    accepts = tuple(SHAPES)
    batch_columns = ("length",)

    def encoder_for(self, layout: Layout) -> RowEncoder:
        return _NoTokens()

    def encoding(self) -> dict[str, Any]:
        """Returns a key that data with tokens never has."""
        return {"tokens": None}

    def collator(self) -> Callable[[list[Any]], Any]:
        return list


if TYPE_CHECKING:
    from lightning_peft.data.prepared_parts import Prepared
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
