"""Prepared data on disk, in resumable parts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features
from filelock import FileLock
from pyarrow import ipc

from lightning_peft.compat.datasets import ArrowWriter
from lightning_peft.data.file_format import Row
from lightning_peft.data.parallel_encoding import Outcome
from lightning_peft.data.reading import SPLITS
from lightning_peft.data.validation import Problem
from lightning_peft.engine import cache_entries

REJECTED = "rejected.jsonl"
# Rows of a part: seconds of work.
PART_ROWS = 8192
# A killed process's workers hold its lock until they notice.
_LOCK_SECONDS = 5


class PartWriter:
    """Writes prepared rows, and those with problems, to the files of a part in a new folder."""

    def __init__(self, folder: Path, features: Features, batch_size: int | None) -> None:
        folder.mkdir()
        self.folder, self.rows = folder, 0
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self._outcomes: dict[str, Any] = {}
        self._writers = {
            split: _writer(folder / f"{split}.arrow", features, batch_size) for split in SPLITS
        }
        self._rejected = (folder / REJECTED).open("w", encoding="utf-8")

    def add(self, outcome: Outcome) -> None:
        """Notes the outcome of one more row, but for what it was encoded to."""
        if outcome.problems or outcome.unused:
            self._outcomes[str(self.rows)] = [outcome.problems, outcome.unused]
        self.rows += 1

    def write(self, split: str, row: Mapping[str, Any]) -> None:
        """Writes an encoded row."""
        self._writers[split].write(row)

    def reject(self, row: Row, problems: Sequence[tuple[str, str]]) -> None:
        """Writes a row with its problems."""
        reasons = [{"kind": kind, "detail": detail} for kind, detail in problems]
        record = {"file": row.file, "row": row.number, "reasons": reasons, "value": row.value}
        self._rejected.write(json.dumps(record, default=_json_default, skipkeys=True) + "\n")

    def finish(self) -> dict[str, Any]:
        """Completes the files, and returns the entry of the part, behind which work continues."""
        for split, writer in self._writers.items():
            if self.counts[split]["rows"]:
                writer.finalize()
        self.close()
        for split in self._writers:
            if not self.counts[split]["rows"]:
                (self.folder / f"{split}.arrow").unlink(missing_ok=True)
        return {"rows": self.rows, "counts": self.counts, "outcomes": self._outcomes}

    def close(self) -> None:
        """Closes the files, complete or not."""
        self._rejected.close()
        for writer in self._writers.values():
            writer.close()


def outcome_in(summary: Mapping[str, Any], number: int) -> Outcome:
    """Returns the outcome of a row of a finished part, by its number in it, without its rows."""
    return Outcome((), *summary["outcomes"].get(str(number), ((), ())))


def _writer(file: Path, features: Features, batch_size: int | None) -> ArrowWriter:
    return ArrowWriter(features=features, path=str(file), writer_batch_size=batch_size)


def _json_default(value: object) -> str:
    # The bytes of an image are of no use to a reader.
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else repr(value)


class PartStore:
    """The finished parts of one preparation, in a folder that one process at a time uses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(str(folder / "lock"), timeout=_LOCK_SECONDS)
        self._owned: bool | None = None

    def close(self) -> None:
        """Lets another process use the folder."""
        self._lock.release()

    def _own(self) -> bool:
        if self._owned is None:
            try:
                self.folder.mkdir(exist_ok=True)
                self._lock.acquire()
                self._owned = True
            except (OSError, NotImplementedError):
                # In use (a `Timeout` is one), or on a disk without locks.
                self._owned = False
        return self._owned

    def found(self) -> list[tuple[Path, dict[str, Any]]]:
        """Returns the finished parts from the first one on, with their summaries."""
        parts: list[tuple[Path, dict[str, Any]]] = []
        if not self.folder.is_dir() or not self._own():
            return parts
        while True:
            part = self._part(len(parts))
            summary = cache_entries.find(part, "part of prepared data")
            if summary is None:
                break
            parts.append((part, summary))
        kept = {part for part, _ in parts}
        for path in self.folder.iterdir():
            # Unfinished, or behind a damaged one.
            if path.is_dir() and path not in kept:
                shutil.rmtree(path, ignore_errors=True)
        return parts

    def keep(self, working: Path, number: int, summary: dict[str, Any]) -> Path:
        """Takes a part over, where this process may, and returns its folder."""
        if not self._own():
            return working
        cache_entries.publish(working, self._part(number), summary)
        # It stays where another process had kept the part before this one owned the folder.
        shutil.rmtree(working, ignore_errors=True)
        return self._part(number)

    def discard(self) -> None:
        """Removes all parts."""
        if self.folder.is_dir() and self._own():
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.release()
            # Where a file that is open cannot be removed.
            shutil.rmtree(self.folder, ignore_errors=True)
            self._owned = None

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:06}"


def join(parts: Sequence[Path], target: Path, features: Features, batch_size: int | None) -> None:
    """Writes the rows of all parts to ``target``, as if there had been one; few are in memory.

    Parts that are inside ``target`` are removed.
    """
    inside = [part for part in parts if part.parent == target]
    if len(parts) == len(inside) == 1:
        for file in list(parts[0].iterdir()):
            file.rename(target / file.name)
    else:
        with (target / REJECTED).open("wb") as rejected:
            for part in parts:
                with (part / REJECTED).open("rb") as lines:
                    shutil.copyfileobj(lines, rejected)
        for split in SPLITS:
            files = [part / f"{split}.arrow" for part in parts]
            _join_rows([file for file in files if file.is_file()], target, features, batch_size)
    for part in inside:
        shutil.rmtree(part)


def _join_rows(
    files: Sequence[Path], target: Path, features: Features, batch_size: int | None
) -> None:
    """Joins files of one name; in each record batch are as many rows as in a file of all."""
    if not files:
        return
    writer = _writer(target / files[0].name, features, batch_size)
    size: int = writer.writer_batch_size
    held: list[Any] = []
    for file in files:
        # Not mapped: pages of a mapped file count as memory of the process.
        with file.open("rb") as stream, ipc.open_stream(stream) as batches:
            for batch in batches:
                held.append(batch)
                if sum(one.num_rows for one in held) >= size:
                    table = pyarrow.Table.from_batches(held)
                    writer.write_table(table.slice(0, size))
                    held = table.slice(size).to_batches()
    if held:
        writer.write_table(pyarrow.Table.from_batches(held))
    writer.finalize()


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
