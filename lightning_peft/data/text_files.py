"""Rows of plain text: a line, a paragraph, or the whole document each."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_peft.data.charsets import Charset
from lightning_peft.data.file_format import FileRow, ReadableFile, TextUnit, text_format
from lightning_peft.data.json_text import parse_json
from lightning_peft.data.open_files import compression_of, open_file

_DAMAGED = re.compile("[\udc80-\udcff]")


def read_text(path: Path, name: str, charset: Charset, unit: TextUnit) -> ReadableFile:
    """Returns the rows of a text file, each with the field ``text``; empty ones are left out.

    Args:
        path: The file.
        name: What messages call it.
        charset: Its encoding.
        unit: What is one row.
    """
    notes = []
    with open_file(path, name) as file:
        first = file.readline(1 << 16).decode(charset.name, "replace").strip()
    if first.startswith("{") and isinstance(parse_json(first)[0], dict):
        notes.append(
            "its first line is a JSON object, and it is trained as plain text; name the file "
            ".jsonl to train on what the fields say"
        )
    format = text_format("text", charset, compression_of(path), notes=tuple(notes))
    return ReadableFile(format, lambda: _entries(path, name, charset, unit))


def _entries(path: Path, name: str, charset: Charset, unit: TextUnit) -> Iterator[FileRow]:
    with open_file(path, name) as file:
        errors = "strict" if charset.whole else "surrogateescape"
        text = io.TextIOWrapper(file, charset.name, errors=errors)
        parts = {"line": _lines, "paragraph": _paragraphs}.get(unit, _document)(text)
        for number, part in enumerate(parts, start=1):
            damaged = _DAMAGED.search(part)
            if damaged is not None:
                byte = ord(damaged[0]) - 0xDC00
                problem = f"is not UTF-8 (byte 0x{byte:02x} as character {damaged.start() + 1})"
                yield FileRow(number, None, problem)
            elif part.strip():
                yield FileRow(number, {"text": part})
        text.detach()


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
