"""Content statistics of rows: roles, turns, scripts and near duplicates."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_peft.data.first_rows import FirstSeen
from lightning_peft.data.samples import Sample

# Stored with the prepared rows.
FILE = "content.json"
# Characters of a row that decide on its writing.
_WRITING_CHARACTERS = 300
# Near duplicates that are named.
_NEAR_SHOWN = 5
_WRITING = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}


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
