"""Keys of rows that nothing reads, with the rows that have them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_peft.errors import ConfigError, similar_names


@dataclass(frozen=True)
class UnusedKey:
    """A key that nothing reads: its name, how many rows have it, and their numbers by file."""

    key: str
    count: int
    rows: dict[str, str]

    @property
    def where(self) -> str:
        """The rows in words, with their files where there are several."""
        if len(self.rows) == 1:
            return f"rows {next(iter(self.rows.values()))}"
        return "; ".join(f"rows {numbers} of {file}" for file, numbers in self.rows.items())


def unused_keys(summary: Mapping[str, Any]) -> list[UnusedKey]:
    """Returns the keys that nothing reads, from the summary of prepared data."""
    return [UnusedKey(**one) for one in summary.get("keys_unused", [])]


def describe_unused(keys: Sequence[UnusedKey]) -> str:
    """Returns keys and rows as one sentence without its end, ``""`` where there are none."""
    return "; ".join(f"{key.key!r} ({key.where})" for key in keys)


class KeyCount:
    """Collects keys that nothing reads, while rows are taken in the order of their files."""

    def __init__(self) -> None:
        # Ranges, as a key is usually in every row.
        self._found: dict[str, dict[str, list[list[int]]]] = {}

    def add(self, keys: Iterable[str], file: str, row: int) -> None:
        """Notes the keys of a row."""
        for key in keys:
            ranges = self._found.setdefault(key, {}).setdefault(file, [])
            if ranges and row == ranges[-1][1] + 1:
                ranges[-1][1] = row
            elif not ranges or row > ranges[-1][1]:
                ranges.append([row, row])

    def summary(self) -> list[dict[str, Any]]:
        """Returns the input of :func:`unused_keys` for JSON, the most frequent keys first."""
        keys = [
            UnusedKey(
                key,
                sum(last - first + 1 for ranges in files.values() for first, last in ranges),
                {
                    file: ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)
                    for file, ranges in files.items()
                },
            )
            for key, files in self._found.items()
        ]
        return [vars(key) for key in sorted(keys, key=lambda key: (-key.count, key.key))]


def check_ignored(ignored: Collection[str], there: Collection[str]) -> None:
    """Refuses keys that are ignored on purpose and that no row has (``there``)."""
    absent = [f"{key!r}{similar_names(key, there)}" for key in ignored if key not in there]
    if absent:
        raise ConfigError(
            f"ignored_keys={sorted(ignored)!r}: no row has {', '.join(absent)}. Take it out, or "
            "correct it."
        )
