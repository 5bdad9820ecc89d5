"""Index of duplicate rows, in a few dozen bytes per row."""

from __future__ import annotations

import struct
from array import array
from typing import Any

from lightning_peft.data.reading import SPLITS

# Of the table of places: a power of two, at most two thirds of it in use.
_SMALLEST = 1 << 10


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
