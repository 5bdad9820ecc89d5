"""Uploaded files: validation, and storage under generated names."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import shutil
import time
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from gradio_app.errors import UserError
from gradio_app.guards import inside, shortened
from gradio_app.redaction import short_name
from gradio_app.settings import Settings
from gradio_app.visitors import LOCAL
from lightning_peft.errors import LightningPeftError

_log = logging.getLogger(__name__)
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet", ".txt")
MAX_FILES = 50
_OWNER = re.compile(r"[A-Za-z0-9][\w-]{0,99}")
_NAME = re.compile(r"\d{8}-[0-9a-f]{8}-[a-z0-9-]{1,40}\.[a-z]{3,7}")
_SNIFF_BYTES = 1_000_000
# A workbook is a zip: how many bytes all of its parts may have, and how many parts.
_WORKBOOK_BYTES, _WORKBOOK_PARTS = 1_000_000_000, 2_000
# How archives, programs and pickles begin; a text file with such bytes is none.
_BINARY_PREFIXES = (
    *(b"PK\x03\x04", b"\x7fELF", b"MZ", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!"),
)


@dataclass(frozen=True)
class Upload:
    """A file that was uploaded, under a name of the page's making; the title is its owner's."""

    name: str
    title: str
    path: Path
    size: int


class Uploads:
    """The uploads of one owner."""

    def __init__(self, settings: Settings, owner: str) -> None:
        if not _OWNER.fullmatch(owner):
            raise ValueError(f"{owner!r} is not an owner")
        self.settings = settings
        self.folder = settings.uploads / owner

    def save(self, file: object, day: str) -> Upload:
        """Checks a file that Gradio has received and keeps it; ``day`` is as ``"20261126"``.

        Raises UserError if it is too large, of another type, or its content does not match its
        name; ``checks.upload_many`` if only :meth:`drop_oldest` makes room for it.
        """
        path = Path(str(file))
        suffix = path.suffix.lower()
        if suffix not in KINDS:
            raise UserError("checks.upload_kind", name=shortened(path.name), kinds=", ".join(KINDS))
        if path.is_symlink() or not path.is_file():
            raise UserError("checks.upload_gone")
        size, most = path.stat().st_size, self.settings.limits.upload_bytes
        if size > most:
            has = f"{size / 1e6:,.1f}"
            raise UserError("checks.upload_size", has=has, most=f"{most / 1e6:,.1f}")
        if size == 0:
            raise UserError("checks.upload_empty", name=shortened(path.name))
        check_content(path, suffix)
        if len(self.list()) >= MAX_FILES:
            raise UserError("checks.upload_many", most=MAX_FILES)
        target = self.folder / f"{day}-{secrets.token_hex(4)}-{_slug(path.stem)}{suffix}"
        try:
            self._copy(path, target)
        except FileNotFoundError:
            # Empty folders are removed meanwhile.
            self._copy(path, target)
        target.chmod(0o600)
        return _upload(target)

    def _copy(self, path: Path, target: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    def drop_oldest(self, recipes: str) -> Upload:
        """Deletes and returns the oldest file whose name does not occur in some recipes.

        Raises UserError if all occur.
        """
        unused = [one for one in self.list() if one.name not in recipes]
        if not unused:
            raise UserError("checks.upload_many", most=MAX_FILES)
        unused[-1].path.unlink()
        return unused[-1]

    def list(self) -> list[Upload]:
        """Returns the files, the newest first."""
        if not self.folder.is_dir():
            return []
        paths = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        found = [path for path in paths if path.is_file() and not path.is_symlink()]
        newest = sorted(found, key=lambda path: (path.stat().st_mtime, path.name), reverse=True)
        return [_upload(path) for path in newest]

    def get(self, name: object) -> Upload:
        """Returns a file by its name here. Raises UserError if the owner has none of that name."""
        known = isinstance(name, str) and _NAME.fullmatch(name)
        path = inside(self.folder, str(name)) if known else None
        if path is None or not path.is_file():
            raise UserError("checks.no_upload", name=shortened(name))
        return _upload(path)


def drop_expired(settings: Settings, recipes: Callable[[str], str]) -> None:
    """Deletes visitors' files that are older than ``limits.keep_hours``, and empty folders.

    ``recipes`` returns the recipes of an owner's runs: files that they name stay. Where it, or
    anything of an owner's files, raises an OSError, they stay until the next time.
    """
    oldest = time.time() - 3600 * (settings.limits.keep_hours or float("inf"))
    for folder in settings.uploads.iterdir() if settings.uploads.is_dir() else ():
        if folder.name == LOCAL or not _OWNER.fullmatch(folder.name):
            continue
        try:
            _drop_expired_of(Uploads(settings, folder.name), oldest, recipes)
        except OSError as error:
            _log.warning("uploads of %s were not deleted: %s", folder.name, error)


def _drop_expired_of(uploads: Uploads, oldest: float, recipes: Callable[[str], str]) -> None:
    owner = uploads.folder.name
    old = [one for one in uploads.list() if _changed(one.path) < oldest]
    kept = recipes(owner) if old else ""
    for one in old:
        # Read once more: a run may have been made meanwhile.
        if one.name not in kept and one.name not in recipes(owner):
            one.path.unlink(missing_ok=True)
    if _changed(uploads.folder) < oldest:
        with contextlib.suppress(OSError):
            uploads.folder.rmdir()


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def check_content(path: Path, suffix: str) -> None:
    """Checks that the beginning of a file matches its suffix. Raises UserError if it is not."""
    with path.open("rb") as file:
        head = file.read(_SNIFF_BYTES)
    if suffix == ".parquet":
        _check_parquet(path, head)
        return
    if suffix == ".xlsx":
        _check_workbook(path)
        return
    values = {"name": shortened(path.name), "kind": suffix}
    text = None if head.startswith(_BINARY_PREFIXES) else _decoded(head, path.name)
    if text is None:
        raise UserError("checks.upload_binary", **values)
    first = text.lstrip()[:1]
    if suffix == ".json" and first not in ("[", "{"):
        raise UserError("checks.upload_json", **values)
    if suffix == ".jsonl" and not _has_json_object(text):
        raise UserError("checks.upload_jsonl", **values)


def _decoded(head: bytes, name: str) -> str | None:
    """Returns the text that a file begins with, in the encoding that it is then read with."""
    charsets = import_module("lightning_peft.data.charsets")
    # A letter may be cut in half at the end of what was read; a line end is not part of one.
    whole = head if len(head) < _SNIFF_BYTES else head[: head.rfind(b"\n") + 1] or head
    try:
        found = charsets.detect(lambda: [whole], name)
    except LightningPeftError:
        return None
    return whole.decode(found.name, errors="replace")


def _check_workbook(path: Path) -> None:
    name = shortened(path.name)
    try:
        with zipfile.ZipFile(path) as book:
            parts = book.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError("checks.upload_binary", name=name, kind=".xlsx") from error
    if "xl/workbook.xml" not in {part.filename for part in parts}:
        raise UserError("checks.upload_binary", name=name, kind=".xlsx")
    if len(parts) > _WORKBOOK_PARTS or sum(part.file_size for part in parts) > _WORKBOOK_BYTES:
        raise UserError("checks.upload_book", name=name)


def _has_json_object(text: str) -> bool:
    """Whether a line is a JSON object; bad ones are reported by the data check."""
    lines = text.splitlines()
    # The last one may be cut; if it is the only one, its beginning tells.
    if len(lines) <= 1 and len(text) > _SNIFF_BYTES // 2:
        return text.lstrip().startswith("{")
    for line in lines[:1000]:
        try:
            if isinstance(json.loads(line), dict):
                return True
        except (ValueError, RecursionError):
            continue
    return False


def _check_parquet(path: Path, head: bytes) -> None:
    parquet = import_module("pyarrow.parquet")
    try:
        # pyarrow looks at the end alone, so that a program or an archive would pass.
        if not head.startswith(b"PAR1"):
            raise ValueError
        parquet.ParquetFile(path).close()
    except (ValueError, OSError) as error:
        name = shortened(path.name)
        raise UserError("checks.upload_binary", name=name, kind=".parquet") from error


def _slug(text: str) -> str:
    """Returns a safe file name of letters and digits."""
    ascii_only = unicodedata.normalize("NFKD", text.casefold()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")[:40].strip("-") or "rows"


def _upload(path: Path) -> Upload:
    return Upload(path.name, short_name(path.name), path, path.stat().st_size)
