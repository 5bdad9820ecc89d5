"""Preview of the training data, and validation without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Features, Value

from lightning_peft.data.data_statistics import LONGEST_ROWS, length_histogram, statistics
from lightning_peft.data.encoding import TextSpan
from lightning_peft.data.json_text import texts_in
from lightning_peft.data.packing import PackedRows
from lightning_peft.data.prepared import Prepared
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
