"""What a model would be trained on: the tokens of the first rows, and numbers on all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.packing import PackedRows
from lightning_peft.data.preparation import Prepared
from lightning_peft.data.shapes import SHAPES
from lightning_peft.data.validation import KINDS, ranges

if TYPE_CHECKING:
    from lightning_peft.data.supervised import SupervisedData

BUCKETS = 8


@dataclass(frozen=True)
class Run:
    """Tokens in a row that are all trained, or all not.

    Attributes:
        trained: Whether they are.
        text: What they say, special tokens too.
        tokens: The tokens in the tokenizer's own spelling.
    """

    trained: bool
    text: str
    tokens: list[str]


@dataclass(frozen=True)
class PreviewedRow:
    """One row as it is trained.

    Attributes:
        split: Its split.
        file: Its file.
        row: Its number.
        runs: Its tokens.
    """

    split: str
    file: str
    row: int
    runs: list[Run]


@dataclass(frozen=True)
class Preview:
    """All that is shown of some data.

    Attributes:
        rows: The first rows of the training data.
        numbers: Shape, template, counts, lengths, packing and problems, ready for JSON.
    """

    rows: list[PreviewedRow]
    numbers: dict[str, Any]


def preview(data: SupervisedData, rows: int) -> Preview:
    """Returns what training on ``data`` would be like.

    Args:
        data: The data, with problems or without.
        rows: How many rows are shown token by token.
    """
    prepared = data.read()
    summary = prepared.summary
    train = summary["splits"]["train"]
    numbers = {
        "data": data.hparams["data"],
        "tokenizer": data.hparams["tokenizer"],
        "shape": {"name": summary["shape"], "title": SHAPES[summary["shape"]].title},
        "columns": summary["columns"],
        "columns_unused": summary["columns_unused"],
        "files_left_out": summary["files_left_out"],
        "template": summary["template"],
        "max_length": data.max_length,
        "rows": summary["rows"],
        "rejected": summary["rejected"],
        "splits": summary["splits"],
        "split_by": summary["split_by"],
        "shared_prompts": summary["shared_prompts"],
        "trained_share": train["trained_tokens"] / max(1, train["tokens"]),
        "lengths": _histogram(prepared.lengths("train"), data.max_length),
        "packing": _packing(prepared.lengths("train"), data.max_length, data.batch_size),
        "problems": _problems(prepared),
    }
    return Preview(list(_shown(data, prepared, rows)), numbers)


def _shown(data: SupervisedData, prepared: Prepared, count: int) -> Iterator[PreviewedRow]:
    tokenizer: Any = data.tokenizer
    for split in list(prepared.splits)[:1]:
        found = prepared.splits[split]
        for row in (found[place] for place in range(min(count, len(found)))):
            pairs = zip(row["input_ids"], row["labels"], strict=True)
            runs = []
            for trained, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
                ids = [token for token, _ in group]
                text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                runs.append(Run(trained, text, tokenizer.convert_ids_to_tokens(ids)))
            yield PreviewedRow(split, row["file"], row["row"], runs)


def _histogram(lengths: Sequence[int], longest: int) -> dict[str, Any]:
    if not lengths:
        return {"mean": 0.0, "longest": 0, "buckets": []}
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


def _packing(lengths: Sequence[int], capacity: int, batch_size: int) -> dict[str, Any]:
    if not lengths:
        return {"rows": 0, "efficiency": 0.0, "efficiency_of_padding": 0.0}
    packed = PackedRows([], lengths, capacity)
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    return {
        "rows": len(packed),
        "efficiency": round(packed.efficiency, 4),
        "efficiency_of_padding": round(sum(lengths) / padded, 4),
    }


def _problems(prepared: Prepared) -> list[dict[str, Any]]:
    found = []
    for kind, (title, way_out) in KINDS.items():
        ones = [problem for problem in prepared.problems if problem.kind == kind]
        if ones:
            rows = [{"file": p.file, "row": p.row, "detail": p.detail} for p in ones]
            numbers = ranges(problem.row for problem in ones)
            entry = {"kind": kind, "title": title, "what_to_do": way_out, "numbers": numbers}
            found.append({**entry, "rows": rows})
    return found
