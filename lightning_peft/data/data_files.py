"""Reading of data files by type, and of plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from lightning_peft.data.charsets import detect
from lightning_peft.data.columnar import read_columnar
from lightning_peft.data.file_format import ReadableFile, ReadOptions, Row, TextFile, TextUnit
from lightning_peft.data.json_files import read_json
from lightning_peft.data.json_text import parse_json
from lightning_peft.data.open_files import (
    COMPRESSED,
    compression_of,
    explain_errors,
    is_workbook,
    open_file,
    refuse_foreign_formats,
    uncompressed_name,
)
from lightning_peft.data.shapes import KNOWN_COLUMNS
from lightning_peft.data.sheets import read_sheet
from lightning_peft.data.tables import read_table
from lightning_peft.errors import ConfigError

_LINES = {".jsonl", ".ndjson"}
_TABLES = {".csv": ".csv", ".tsv": ".tsv", ".tab": ".tsv"}
_BINARY = {".parquet": "Parquet", ".arrow": "Arrow"}
_BOOKS = {".xlsx", ".xlsm"}
_TEXTS = {".txt", ".md"}
SUFFIXES = sorted({*_LINES, ".json", *_TABLES, *_BINARY, *_BOOKS, *_TEXTS})
# Kinds that people have, and what to do with them.
_REFUSED = {
    ".xls": "is a workbook of old Excel: open it, and save it as .xlsx or as CSV (UTF-8)",
    ".xlsb": "is a binary workbook of Excel: open it, and save it as .xlsx or as CSV (UTF-8)",
    ".ods": "is a sheet of LibreOffice: save it as .xlsx, or as CSV with the character set UTF-8",
    ".numbers": "is a sheet of Numbers: export it as CSV (UTF-8) or Excel",
    ".gsheet": "is a link to Google Sheets: download it as .csv or .xlsx",
    ".pkl": "is a Python pickle, which can run code: load it where you trust it, and write JSONL",
    ".pdf": "is a PDF: take its text out, and save it as .txt",
    ".docx": "is a document of Word: save it as plain text (.txt, UTF-8)",
    ".db": "is a database: export its table as CSV (UTF-8)",
    ".sqlite": "is a database: export its table as CSV (UTF-8)",
    ".tar": "is an archive: unpack it (tar -xf), and name the folder",
    ".tgz": "is an archive: unpack it (tar -xf), and name the folder",
    ".7z": "is an archive: unpack it, and name the folder",
    ".rar": "is an archive: unpack it, and name the folder",
}


_DAMAGED = re.compile("[\udc80-\udcff]")


def is_data_file(path: Path) -> bool:
    """Returns whether rows can be read from a file of this name."""
    return _bare_suffix(path) in SUFFIXES


def is_text_file(path: Path) -> bool:
    """Returns whether a file of this name is a document, or a list of texts."""
    return _bare_suffix(path) in _TEXTS


def _bare_suffix(path: Path) -> str:
    bare = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return bare.suffix.lower()


def suffix_of(path: Path) -> str:
    """Returns the suffix of a file, or of the one file in a zip, if rows can be read from it."""
    bare = PurePosixPath(path.name)
    if path.suffix.lower() == ".zip" or not is_data_file(path):
        bare = uncompressed_name(path)
    suffix = Path(bare).with_suffix("").suffix if bare.suffix.lower() in COMPRESSED else bare.suffix
    if suffix.lower() in SUFFIXES:
        return suffix.lower()
    if suffix.lower() in _REFUSED:
        raise ConfigError(f"{path.name!r} {_REFUSED[suffix.lower()]}.")
    raise ConfigError(
        f"{path.name!r} is of no kind that can be read. Kinds: {', '.join(SUFFIXES)}, and these "
        f"with {', '.join(sorted(COMPRESSED))} after that."
    )


def read_file(path: Path, name: str, options: ReadOptions) -> ReadableFile:
    """Opens a file of rows."""
    with explain_errors(name):
        stat = path.stat()
    return _read(path, name, options, (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@lru_cache(maxsize=64)
def _read(path: Path, name: str, options: ReadOptions, stamp: tuple[int, int, int]) -> ReadableFile:
    if not stamp[0]:
        raise ConfigError(f"There are no rows in {name!r}: the file is empty.")
    suffix = suffix_of(path)
    known = KNOWN_COLUMNS | options.columns
    # A workbook is a zip of many files.
    if suffix in _BOOKS or (compression_of(path) == "zip" and is_workbook(path)):
        return read_sheet(path, name, options.sheet, known)
    with open_file(path, name) as raw:
        start = raw.read(512)
    magic = {b"PAR1": "Parquet", b"ARRO": "Arrow"}.get(start[:4])
    if magic is not None or suffix in _BINARY:
        return read_columnar(path, name, magic or _BINARY[suffix])
    refuse_foreign_formats(start, name)
    file = TextFile(path, name, detect(lambda: _blocks(path, name), name, options.encoding))
    if suffix in _LINES or suffix == ".json":
        return read_json(file, suffix in _LINES)
    if suffix in _TABLES:
        return read_table(file, _TABLES[suffix], options.delimiter, known)
    return read_text(file, options.text_unit)


def _blocks(path: Path, name: str) -> Iterator[bytes]:
    with open_file(path, name) as file:
        while block := file.read(1 << 20):
            yield block


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


def _entries(file: TextFile, unit: TextUnit) -> Iterator[Row]:
    with file.open() as text:
        lines = (line.rstrip("\r\n") for line in text)
        parts = {"line": lines, "paragraph": _paragraphs(text)}.get(unit) or [text.read()]
        for number, part in enumerate(parts, start=1):
            damaged = _DAMAGED.search(part)
            if damaged is not None:
                byte = ord(damaged[0]) - 0xDC00
                problem = f"is not UTF-8 (byte 0x{byte:02x} as character {damaged.start() + 1})"
                yield Row(number, file.name, None, problem)
            elif part.strip():
                yield Row(number, file.name, {"text": part})


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
