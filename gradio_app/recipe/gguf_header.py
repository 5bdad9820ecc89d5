"""GGUF headers: architecture and tensor sizes.

Not ``gguf.GGUFReader``: it takes seconds for the vocabulary, and this is asked while a page waits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

# Bytes of a value by its type; texts and lists begin with their lengths.
_BYTES = {**dict.fromkeys((0, 1, 7), 1), 2: 2, 3: 2, **dict.fromkeys((4, 5, 6), 4)}
_BYTES |= dict.fromkeys((10, 11, 12), 8)
_TEXT, _LIST, _UINT32, _UINT64 = 8, 9, 4, 10
_UNREADABLE = (OSError, ValueError, OverflowError, RecursionError, KeyError, struct.error)
# Longer texts are templates, of which it matters that they are there.
_SHORT = 64
_LONGEST_KEY = 65_535


@dataclass(frozen=True)
class GgufHeader:
    """The header of a file: values of each tensor, architecture, most tokens, chat template."""

    sizes: tuple[int, ...] = ()
    architecture: str = ""
    context: int | None = None
    has_chat_template: bool = False


def gguf_header(file: Path) -> GgufHeader:
    """Returns the header of a file; an empty one if it cannot be read."""
    try:
        found = file.stat()
        return _header(file, (found.st_mtime_ns, found.st_size))
    except _UNREADABLE:
        return GgufHeader()


@lru_cache(maxsize=32)
def _header(file: Path, stamp: tuple[int, int]) -> GgufHeader:
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file.name} does not begin as GGUF does")
        _, tensors, values = _numbers(opened, "<IQQ")
        found = dict(_entry(opened) for _ in range(values))
        kind = found.get("general.architecture")
        context = found.get(f"{kind}.context_length")
        return GgufHeader(
            tuple(_tensor(opened) for _ in range(tensors)),
            kind if isinstance(kind, str) else "",
            context if isinstance(context, int) else None,
            "tokenizer.chat_template" in found,
        )


def _entry(opened: BufferedReader) -> tuple[str, str | int | None]:
    """Reads a key with its value: of short texts and unsigned numbers, else ``None``."""
    length = _number(opened, "<Q")
    if length > _LONGEST_KEY:
        raise ValueError(f"a key of {length} bytes, where GGUF allows {_LONGEST_KEY}")
    name = opened.read(length).decode("utf-8", "replace")
    kind = _number(opened, "<I")
    if kind in (_UINT32, _UINT64):
        return name, _number(opened, "<I" if kind == _UINT32 else "<Q")
    if kind == _TEXT:
        length = _number(opened, "<Q")
        if length <= _SHORT:
            return name, opened.read(length).decode("utf-8", "replace")
        opened.seek(length, 1)
    else:
        _skip(opened, kind)
    return name, None


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
