"""How the columns of a text table are parted and quoted."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lightning_peft.errors import ConfigError

_USUAL = (",", ";", "\t", "|")
_RARE = ("\x01", "\x1f", "^", "~", "\u00a6")
_NAMED = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "pipe": "|", "space": " "}


@dataclass(frozen=True)
class Dialect:
    """How a table is written.

    A quote in a quoted value has a backslash before it if ``escaped``, else it is doubled; a space
    follows each delimiter if ``spaced``; ``skipped`` lines precede the names of the columns.
    """

    delimiter: str
    quote: str = '"'
    escaped: bool = False
    spaced: bool = False
    skipped: int = 0

    def records(self, lines: Iterable[str]) -> Any:
        """Returns a reader of records in lines of text with their ends."""
        # Python's limit of 128 KiB is the length of a long document.
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        if self.escaped:
            lines = (line.replace('\\"', '""') for line in lines)
        return csv.reader(
            iter(lines),
            delimiter=self.delimiter,
            quotechar=self.quote,
            skipinitialspace=self.spaced,
            strict=True,
        )


def parse_delimiter(requested: str) -> str:
    """Returns the delimiter that the user means, such as ``";"`` or ``"tab"``."""
    found = _NAMED.get(requested.lower(), requested)
    if len(found) != 1 or found in '"\r\n\\':
        raise ConfigError(
            f"delimiter={requested!r} is not one character that parts columns. Such are "
            f"{', '.join(map(repr, _USUAL))}, and the words {', '.join(sorted(_NAMED)[1:])}."
        )
    return found


def detect_dialect(
    head: str, whole: bool, usual: str, requested: str | None, known: frozenset[str]
) -> Dialect:
    """Returns how a table is written, by its first lines, which may be the ``whole`` file.

    A delimiter is likely if it yields ``known`` names of columns.
    """
    skipped = 0
    excel_hint = re.match(r'"?sep=(.)"?\r?\n', head)
    if excel_hint:
        # A line that Excel writes for itself.
        skipped, head = 1, head[excel_hint.end() :]
        requested = requested or excel_hint[1]
    candidates = (requested,) if requested is not None else _USUAL
    found = _best(head, whole, candidates, usual, known)
    if found is None and requested is None:
        # R's write.table parts quoted names by spaces.
        quoted = re.match(r'"[^"\r\n]*"( "[^"\r\n]*")+\r?\n', head)
        found = _best(head, whole, (*_RARE, " ") if quoted else _RARE, usual, known)
    return replace(found or Dialect(requested or usual), skipped=skipped)


def _best(
    head: str, whole: bool, candidates: Iterable[str], usual: str, known: frozenset[str]
) -> Dialect | None:
    ranked = []
    for delimiter in candidates:
        for dialect in _candidates(head, delimiter):
            records = _sample_records(dialect, head, whole)
            if not records or len(records[0]) < 2:
                continue
            width = len(records[0])
            # Rows of another width show that the delimiter is part of the text.
            fit = sum(len(record) == width for record in records) / len(records)
            names = sum(bool({n.strip(), n.strip().lower()} & known) for n in records[0])
            ranked.append(((round(fit, 3), names, delimiter == usual), dialect))
    return max(ranked, key=lambda one: one[0])[1] if ranked else None


def _candidates(head: str, delimiter: str) -> Iterator[Dialect]:
    plain = Dialect(delimiter)
    first = head.partition("\n")[0].strip()
    names = first.split(delimiter)
    if len(names) > 1 and all(re.fullmatch(r"\s*'.*'\s*", name) for name in names):
        yield replace(plain, quote="'")
        return
    # `"a", "b"`: else the second quote would be part of the text.
    spaced = len(names) > 1 and all(re.match(r'\s+"', name) for name in names[1:])
    yield replace(plain, spaced=spaced)


def _sample_records(dialect: Dialect, head: str, whole: bool) -> list[list[str]]:
    found: list[list[str]] = []
    try:
        for record in dialect.records(io.StringIO(head, newline="")):
            found += [record] if record else []
    except csv.Error:
        # Cut off, or quoted in another way, which is seen when all of it is read.
        return found
    return found if whole else found[:-1] or found
