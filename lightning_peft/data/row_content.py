"""Content statistics of rows: roles, turns, scripts, duplicates and near duplicates."""

from __future__ import annotations

import json
import struct
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_peft.data.reading import SPLITS
from lightning_peft.data.samples import Sample

# Stored with the prepared rows.
FILE = "content.json"
# Characters of a row that decide on its writing.
_WRITING_CHARACTERS = 300
# Near duplicates that are named.
_NEAR_SHOWN = 5
_WRITING = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
# Of the table of places: a power of two, at most two thirds of it in use.
_SMALLEST = 1 << 10


class ContentCounter:
    """Counts roles, turns, languages, writing systems and near duplicates of rows that are used."""

    def __init__(self) -> None:
        self._roles: Counter[str] = Counter()
        self._turns: Counter[int] = Counter()
        self._writing: Counter[str] = Counter()
        self._languages: Counter[str] = Counter()
        # File and row number.
        self._near = FirstSeen("IQ")
        self._files: dict[str, int] = {}
        self._like: list[dict[str, Any]] = []
        self._near_count = 0

    def add(self, sample: Sample, file: str, row: int, again: bool = False) -> None:
        """Counts a row; if it is there ``again``, an exact duplicate, not as a near one."""
        if sample.messages:
            self._turns[len(sample.messages)] += 1
            self._roles.update(str(turn.get("role")) for turn in sample.messages)
        self._languages.update(name for name, text in (sample.translation or {}).items() if text)
        writing = writing_system("".join(_texts(sample)))
        if writing:
            self._writing[writing] += 1
        near = None if again else sample.near_digest()
        here = self._files.setdefault(file, len(self._files)), row
        if near is None or (first := self._near.setdefault(near, *here)) == here:
            return
        self._near_count += 1
        if len(self._like) < _NEAR_SHOWN:
            before = {"like_file": list(self._files)[first[0]], "like_row": first[1]}
            self._like.append({"file": file, "row": row, **before})

    def write(self, folder: Path) -> None:
        """Writes what was counted to a folder."""
        turns = sum(self._turns.values())
        content: dict[str, Any] = {
            "writing": dict(self._writing.most_common()),
            "near_duplicates": self._near_count,
            "near_duplicate_rows": self._like,
        }
        if self._languages:
            content["languages"] = dict(self._languages.most_common())
        if turns:
            total = sum(number * rows for number, rows in self._turns.items())
            content["turns"] = {
                "conversations": turns,
                "least": min(self._turns),
                "most": max(self._turns),
                "mean": round(total / turns, 1),
                "roles": dict(self._roles.most_common()),
            }
        (folder / FILE).write_text(json.dumps(content), encoding="utf-8")


def _texts(sample: Sample) -> Iterator[str]:
    """Yields the beginnings of a row's texts, as many as decide on its writing."""
    texts = [turn.get("content") for turn in sample.messages]
    texts += [sample.text, sample.text_pair, *(sample.translation or {}).values(), *sample.tokens]
    left = _WRITING_CHARACTERS
    for text in texts:
        if isinstance(text, str) and left > 0:
            yield text[:left]
            left -= len(text)


def writing_system(text: str) -> str:
    """Returns the writing system of most letters: ``"Latin"``, ``"Kana"``, ``"Han"`` or others."""
    counts: Counter[str] = Counter()
    # A text has few different characters.
    for character, number in Counter(text).items():
        counts[_system_of(character)] += number
    counts.pop("", None)
    if counts["Kana"]:
        counts["Kana"] += counts.pop("Han", 0)
    return min(counts, key=lambda name: (-counts[name], name)) if counts else ""


@lru_cache(maxsize=4096)
def _system_of(character: str) -> str:
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
    return _WRITING.get(first, first.capitalize())


def read_content(folder: Path) -> dict[str, Any]:
    """Returns the counts of the rows that were prepared in a folder; none of older data."""
    file = folder / FILE
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


class FirstSeen:
    """A dictionary from digests of 16 bytes to ``numbers`` (a format of :mod:`struct`); it grows.

    An entry takes its 16 bytes, its numbers, and 6 to 12 bytes of a table of places, where one of
    a ``dict`` takes 168 and more.
    """

    def __init__(self, numbers: str) -> None:
        self._entry = struct.Struct(f"<16s{numbers}")
        self._entries = bytearray()
        self._count = 0
        # The number of an entry, from 1, where the first bytes of its digest say; 0 is free.
        self._places = array("I", bytes(_SMALLEST * array("I").itemsize))

    def __len__(self) -> int:
        return self._count

    def setdefault(self, digest: bytes, *numbers: int) -> tuple[Any, ...]:
        """Returns the numbers that came with ``digest`` first, which may be these."""
        place = self._place_of(digest)
        number = self._places[place]
        if number:
            return self._entry.unpack_from(self._entries, (number - 1) * self._entry.size)[1:]
        self._entries += self._entry.pack(digest, *numbers)
        self._count += 1
        self._places[place] = self._count
        if 3 * self._count > 2 * len(self._places):
            self._grow()
        return numbers

    def _place_of(self, digest: bytes) -> int:
        """Returns the place of a digest, or the free one where it belongs."""
        mask, size = len(self._places) - 1, self._entry.size
        place = int.from_bytes(digest[:8], "little") & mask
        while number := self._places[place]:
            start = (number - 1) * size
            if self._entries.startswith(digest, start):
                break
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        self._places = array("I", bytes(2 * len(self._places) * self._places.itemsize))
        size = self._entry.size
        for number in range(self._count):
            digest = bytes(self._entries[number * size : number * size + 16])
            self._places[self._place_of(digest)] = number + 1


class FirstRows:
    """Finds rows whose content came before."""

    def __init__(self, *, keep_duplicates: bool) -> None:
        self.keep_duplicates = keep_duplicates
        # Split, file and row number.
        self._first = FirstSeen("BIQ")
        self._files: dict[str, int] = {}

    def problems(
        self, file: str, row: int, digest: bytes, split: str
    ) -> tuple[list[tuple[str, str]], bool]:
        """Returns the problems of a row with an earlier one, and whether it is one more of it."""
        here = SPLITS.index(split), self._files.setdefault(file, len(self._files)), row
        before = self._first.setdefault(digest, *here)
        if before == here:
            return [], False
        place = f"row {before[2]}"
        if before[1] != here[1]:
            place = f"{place} of {list(self._files)[before[1]]}"
        if before[0] != here[0]:
            first = SPLITS[before[0]]
            return [
                ("leak", f"is for {split} and the same as {place}, which is for {first}")
            ], False
        if self.keep_duplicates:
            return [], True
        return [("duplicate", f"is the same as {place}")], False
