"""Opening of data files: signatures and compression."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import pyarrow

from lightning_peft.errors import ConfigError, LightningPeftError, itemize

T = TypeVar("T")
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
}
_UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    pyarrow.ArrowException,
    # zipfile's of members with a password, and of a compression that Python does not know.
    RuntimeError,
    NotImplementedError,
)
# First bytes of what is often saved under the name of a table -> what it is and what to do.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS in place of the file",
        "fetch the file itself: git lfs pull",
    ),
    (b"<!doctype html", "a page of HTML", "download the file itself; this is often a login page"),
    (b"<html", "a page of HTML", "download the file itself; this is often a login page"),
    (b"<?xml", "XML", "export the rows as CSV (UTF-8) or JSONL"),
    (b"%pdf", "a PDF", "export the rows as CSV (UTF-8) or JSONL"),
    (b"sqlite format 3", "an SQLite database", "export its table as CSV (UTF-8) or JSONL"),
    (b"{\\rtf", "a text of a word processor (RTF)", "save it as plain text in UTF-8"),
    (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "a workbook or document of old Excel or Word (.xls, .doc)",
        "open it, and save the sheet as .xlsx or as CSV (UTF-8)",
    ),
    (b"7z\xbc\xaf\x27\x1c", "an archive of 7-Zip", "unpack it, and name the file or folder"),
    (b"rar!", "a RAR archive", "unpack it, and name the file or folder"),
    *(
        (magic, "compressed twice", "unpack it once, and name what comes out")
        for magic in (b"\x1f\x8b", b"\xfd7zxz", b"\x28\xb5\x2f\xfd")
    ),
    (b"\x89png", "an image", "name a file of rows"),
    (b"\x80\x04", "a Python pickle", "load it where you trust it, and write JSONL"),
)


def compression_of(path: Path) -> str | None:
    """Returns ``"gzip"``, ``"bzip2"``, ``"xz"``, ``"zstd"``, ``"zip"``, or ``None``."""
    with explain_errors(path.name), path.open("rb") as file:
        start = file.read(8)
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)


def uncompressed_name(path: Path) -> PurePosixPath:
    """Returns the name without the suffix of its compression; of a zip, that of the file in it."""
    compression = compression_of(path) if path.is_file() else None
    if compression == "zip" and not is_workbook(path):
        return PurePosixPath(_member(path)).relative_to(PurePosixPath(_member(path)).parent)
    bare = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return PurePosixPath(bare.name)


def is_workbook(path: Path) -> bool:
    """Returns whether a zip is a workbook of Excel or LibreOffice, or a like document."""
    with explain_errors(path.name), zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    return bool(names & {"[Content_Types].xml", "content.xml", "mimetype"})


def _member(path: Path) -> str:
    with explain_errors(path.name), zipfile.ZipFile(path) as archive:
        names = [
            info.filename
            for info in archive.infolist()
            if not info.is_dir() and not _is_hidden(info.filename)
        ]
    if len(names) != 1:
        raise ConfigError(
            f"{path.name!r} holds {len(names)} files, and one is read from a zip. Unpack it "
            f"(unzip {path.name} -d rows), and name the folder." + itemize(names)
        )
    return names[0]


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


@contextmanager
def open_file(path: Path, name: str) -> Iterator[BinaryIO]:
    """Opens a file as a stream of bytes, decompressed."""
    compression = compression_of(path)
    with explain_errors(name, compression), path.open("rb") as raw:
        stream: Any
        if compression == "zip":
            with zipfile.ZipFile(raw) as archive, archive.open(_member(path)) as stream:
                yield io.BufferedReader(stream)
        elif compression == "zstd":
            # pyarrow's: Python has none before 3.14.
            with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as stream:
                yield io.BufferedReader(stream)
        else:
            openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
            if compression is None:
                yield raw
                return
            with openers[compression](raw, "rb") as stream:
                yield stream


@contextmanager
def explain_errors(name: str, compression: str | None = None) -> Iterator[None]:
    """Turns errors of the system and of libraries on the file ``name`` into a ConfigError."""
    try:
        yield
    except LightningPeftError:
        raise
    except FileNotFoundError as error:
        if isinstance(error.filename, str | Path) and Path(error.filename).is_symlink():
            raise ConfigError(
                f"{name!r} is a link to {os.readlink(error.filename)!r}, which is not there. Fetch "
                "that file (git annex get, dvc pull), or remove the link."
            ) from error
        raise ConfigError(f"{name!r} is gone: it was removed or renamed meanwhile.") from error
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"the system reports: {os.strerror(error.errno)}"
            raise ConfigError(f"{name!r} cannot be read; {reason}.") from error
        if isinstance(error, RuntimeError) and "password" in str(error):
            raise ConfigError(
                f"{name!r} is locked by a password. Unpack it, and name the file in it."
            ) from error
        tool = "unzip" if compression == "zip" else compression
        how = f" ({tool} -t {name} says where)" if tool else ""
        raise ConfigError(
            f"{name!r} is damaged or breaks off{f' as {compression}' if compression else ''}{how}. "
            "Download or write it once more."
        ) from error


def refuse_foreign_formats(start: bytes, name: str) -> None:
    """Refuses formats without rows, known by the first bytes of a file, with the fix."""
    head = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, what, remedy in _OTHERS:
        if head.startswith(magic):
            raise ConfigError(f"{name!r} is {what}, not rows. What to do: {remedy}.")


def explained_rows(
    rows: Iterable[T],
    explain: Callable[[int, Exception], str],
    errors: tuple[type[Exception], ...] = (Exception,),
) -> Iterator[T]:
    """Yields ``rows``; ``explain`` gets the number before a failure and one of ``errors``."""
    number, iterator = 0, iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except LightningPeftError:
            raise
        except errors as error:
            raise ConfigError(explain(number, error)) from error
        yield row
        number += 1
