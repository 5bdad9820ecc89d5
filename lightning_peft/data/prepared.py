"""Prepared data on disk: rows per split, problems and summary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from lightning_peft.data.prepared_parts import REJECTED
from lightning_peft.data.reading import SPLITS
from lightning_peft.data.validation import Problem
from lightning_peft.engine import cache_entries


@dataclass(frozen=True)
class Prepared:
    """Data that is ready to be trained on.

    ``splits`` are the encoded rows of each split with rows, with their ``file`` and ``row``,
    memory-mapped; ``problems`` those of the rows that are left out.
    """

    splits: dict[str, Dataset]
    problems: list[Problem]
    summary: dict[str, Any]
    folder: Path

    def lengths(self, split: str) -> list[int]:
        """Returns the column ``length`` of every row, its tokens or frames; ``[]`` without one."""
        if split not in self.splits or "length" not in self.splits[split].column_names:
            return []
        found: list[int] = self.splits[split].data.column("length").to_pylist()
        return found


def open_prepared(folder: Path) -> Prepared:
    """Opens what is prepared in a folder; rows are read as they are asked for."""
    summary = json.loads((folder / cache_entries.SUMMARY).read_text(encoding="utf-8"))
    splits = {
        split: Dataset.from_file(str(folder / f"{split}.arrow"))
        for split in SPLITS
        if summary["splits"][split]["rows"]
    }
    return Prepared(splits, _read_problems(folder / REJECTED), summary, folder)


def _read_problems(file: Path) -> list[Problem]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Problem(reason["kind"], row["file"], row["row"], reason["detail"])
        for row in rows
        for reason in row["reasons"]
    ]
