"""How large the tensors of a GGUF file are, by its header.

Not ``gguf.GGUFReader``: it takes seconds for the vocabulary, and this is asked while a page waits.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

# Bytes of a value by its type; texts and lists begin with their lengths.
_BYTES = {**dict.fromkeys((0, 1, 7), 1), 2: 2, 3: 2, **dict.fromkeys((4, 5, 6), 4)}
_BYTES |= dict.fromkeys((10, 11, 12), 8)
_TEXT, _LIST = 8, 9


def gguf_sizes(file: Path) -> list[int]:
    """Returns the number of values of each tensor in a file; empty if it cannot be read."""
    try:
        found = file.stat()
        return list(_sizes(file, (found.st_mtime_ns, found.st_size)))
    except (OSError, ValueError, OverflowError, RecursionError, KeyError, struct.error):
        return []


@lru_cache(maxsize=32)
def _sizes(file: Path, stamp: tuple[int, int]) -> tuple[int, ...]:
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file.name} does not begin as GGUF does")
        _, tensors, values = _numbers(opened, "<IQQ")
        for _ in range(values):
            _skip(opened, _TEXT)
            _skip(opened, _number(opened, "<I"))
        return tuple(_tensor(opened) for _ in range(tensors))


def _tensor(opened: BufferedReader) -> int:
    _skip(opened, _TEXT)
    shape = _numbers(opened, f"<{_number(opened, '<I') % 16}Q")
    # Its type, and where it begins.
    _numbers(opened, "<IQ")
    return prod(shape)


def _skip(opened: BufferedReader, kind: int) -> None:
    if kind == _TEXT:
        opened.seek(_number(opened, "<Q"), 1)
    elif kind == _LIST:
        of, count = _numbers(opened, "<IQ")
        if of in _BYTES:
            opened.seek(count * _BYTES[of], 1)
        else:
            for _ in range(count):
                _skip(opened, of)
    else:
        opened.seek(_BYTES[kind], 1)


def _number(opened: BufferedReader, form: str) -> int:
    return int(_numbers(opened, form)[0])


def _numbers(opened: BufferedReader, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, opened.read(struct.calcsize(form)))
