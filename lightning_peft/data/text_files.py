"""Rows of plain text: a line, a paragraph, or the whole document each."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator

from lightning_peft.data.file_format import FileRow, ReadableFile, TextFile, TextUnit
from lightning_peft.data.json_text import parse_json

_DAMAGED = re.compile("[\udc80-\udcff]")


def read_text(file: TextFile, unit: TextUnit) -> ReadableFile:
    """Opens a text file, whose units are rows with the field ``text``; empty ones are left out."""
    notes = []
    with file.open("replace") as text:
        first = text.readline(1 << 16).strip()
    if first.startswith("{") and isinstance(parse_json(first)[0], dict):
        notes.append(
            "its first line is a JSON object, and it is trained as plain text; name the file "
            ".jsonl to train on what the fields say"
        )
    format = file.format("text", notes=tuple(notes))
    return ReadableFile(format, lambda: _entries(file, unit))


def _entries(file: TextFile, unit: TextUnit) -> Iterator[FileRow]:
    with file.open() as text:
        parts = {"line": _lines, "paragraph": _paragraphs}.get(unit, _document)(text)
        for number, part in enumerate(parts, start=1):
            damaged = _DAMAGED.search(part)
            if damaged is not None:
                byte = ord(damaged[0]) - 0xDC00
                problem = f"is not UTF-8 (byte 0x{byte:02x} as character {damaged.start() + 1})"
                yield FileRow(number, None, problem)
            elif part.strip():
                yield FileRow(number, {"text": part})


def _lines(text: Iterable[str]) -> Iterator[str]:
    yield from (line.rstrip("\r\n") for line in text)


def _paragraphs(text: Iterable[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in text:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


def _document(text: io.TextIOWrapper) -> Iterator[str]:
    yield text.read()
