"""What a model would be trained on: the first rows, and numbers on all; or a check without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Features, Value

from lightning_peft.data.encoding import TextSpan
from lightning_peft.data.packing import PackedRows
from lightning_peft.data.preparation import Prepared
from lightning_peft.data.row_data_module import RowDataModule
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import SHAPES, Layout
from lightning_peft.data.validation import KINDS, by_kind, ranges

BUCKETS = 8


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


def preview(data: RowDataModule, rows: int) -> Preview:
    """Returns a preview of training on ``data``, with its first ``rows`` in full."""
    prepared = data.read()
    summary = prepared.summary
    train = summary["splits"]["train"]
    numbers = {
        **summary,
        "data": data.hparams["data"],
        "shape": {"name": summary["shape"], "title": SHAPES[summary["shape"]].title},
        "problems": _problems(prepared),
    }
    lengths = prepared.lengths("train")
    if lengths:
        longest = getattr(data, "max_length", max(lengths))
        numbers["max_length"] = longest
        numbers["lengths"] = _histogram(lengths, longest)
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
    shown = [
        PreviewedRow(split, row["file"], row["row"], data.render_row(row))
        for split in list(prepared.splits)[:1]
        for row in prepared.splits[split].select(range(min(rows, len(prepared.splits[split]))))
    ]
    return Preview(shown, numbers)


def _histogram(lengths: Sequence[int], longest: int) -> dict[str, Any]:
    # Up to the longest row that there is: short data in a long context is the usual case.
    width = max(1, -(-max(lengths) // BUCKETS))
    counts = [0] * (-(-max(lengths) // width))
    for length in lengths:
        counts[(length - 1) // width] += 1
    buckets = [
        {"from": i * width + 1, "to": min((i + 1) * width, longest), "rows": n}
        for i, n in enumerate(counts)
    ]
    mean = sum(lengths) / len(lengths)
    return {"mean": round(mean, 1), "longest": max(lengths), "buckets": buckets}


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
        numbers = ranges(problem.row for problem in ones)
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
