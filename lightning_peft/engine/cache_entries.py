"""Cache entries on disk, named by a hash of their inputs and created atomically.

An entry appears with its whole content, by one rename, or not at all. Processes that make the same
one at the same time each write their own; the first to finish is kept, and they are the same.
Reading a list of entries needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.errors import ConfigError

SUMMARY = "summary.json"
# What writing leaves free: a full disk would stop what this was to make faster.
_SPARED_SHARE, _SPARED_BYTES = 0.1, 20 << 30

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Returns the folder that all caches of this package are in, after the XDG specification."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lightning-peft"


def key_of(**parts: Any) -> str:
    """Returns the name of the entry that ``parts`` decide."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def find(final: Path, kind: str) -> dict[str, Any] | None:
    """Returns the summary of an entry and notes that it was used; removes it if it is damaged."""
    if not final.exists():
        return None
    damage = damage_of(final)
    if damage is not None:
        discard(final, kind, damage)
        return None
    summary: dict[str, Any] = json.loads((final / SUMMARY).read_text(encoding="utf-8"))
    try:
        os.utime(final / SUMMARY)
    except OSError:
        # Somebody else's, or on a disk that is only read.
        log.debug("The use of %s was not noted.", final)
    return summary


def discard(final: Path, kind: str, damage: str) -> None:
    """Removes a damaged entry and says so."""
    log.warning("The %s in %s is damaged (%s); it is rebuilt.", kind, final, damage)
    remove(final)


def remove(final: Path) -> None:
    """Removes an entry; who reads it at that moment sees the whole of it, or none."""
    aside = final.with_name(f".{final.name}-{secrets.token_hex(4)}-removed")
    try:
        final.rename(aside)
    except FileNotFoundError:
        return
    except OSError:
        aside = final
    shutil.rmtree(aside, ignore_errors=True)


def make(final: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    """Makes an entry, unless another process was faster."""
    working = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        publish(working, final, build(working))
    finally:
        shutil.rmtree(working, ignore_errors=True)


def publish(working: Path, final: Path, summary: dict[str, Any]) -> None:
    """Makes an entry of a folder of files, unless another process was faster."""
    summary["files"] = {path.name: path.stat().st_size for path in sorted(working.iterdir())}
    (working / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    for path in working.iterdir():
        _to_disk(path)
    try:
        working.rename(final)
    except OSError:
        # Another process was faster.
        if damage_of(final) is not None:
            raise


def entry(
    folder: Path, key: str, build: Callable[[Path], dict[str, Any]], kind: str, argument: str
) -> Path:
    """Returns the folder of an entry, which is built first if it is not there."""
    final = folder / key
    if find(final, kind) is not None:
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Tells a folder that is only read from errors of the building itself.
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise ConfigError(
            f"{kind.capitalize()} cannot be kept in {str(folder)!r}: {error.strerror or error}. "
            f"Name a folder that can be written to with {argument}=."
        ) from error
    make(final, build)
    return final


def damage_of(final: Path) -> str | None:
    """The problem with an entry, or ``None``."""
    try:
        summary = json.loads((final / SUMMARY).read_text(encoding="utf-8"))
        sizes = dict(summary["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SUMMARY}: {error}"
    for name, size in sizes.items():
        path = final / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is not the {size} bytes that were written"
    return None


def has_room(folder: Path, size: int) -> bool:
    """Whether ``size`` bytes leave a tenth of the disk, or 20 GiB, free."""
    disk = shutil.disk_usage(folder)
    return disk.free - size >= min(int(_SPARED_SHARE * disk.total), _SPARED_BYTES)


@dataclass(frozen=True)
class Entry:
    """An entry in a list.

    Attributes:
        folder: Where it is.
        summary: What was stored with it; empty if that cannot be read.
        size: Bytes of its files.
        age: Seconds since it was made.
        unused: Seconds since it was last used.
        whole: Whether it can be used. What an interrupted process left behind cannot.
    """

    folder: Path
    summary: dict[str, Any]
    size: int
    age: float
    unused: float
    whole: bool


def entries(folder: Path) -> list[Entry]:
    """Returns the entries below ``folder``, the last used first, with what was left behind."""
    if not folder.is_dir():
        return []
    found = [_described(path) for path in folder.iterdir() if path.is_dir()]
    return sorted((item for item in found if item is not None), key=lambda item: item.unused)


def _described(path: Path) -> Entry | None:
    now = time.time()
    whole = not path.name.startswith(".") and damage_of(path) is None
    try:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        # Nothing is made inside an entry after it was made.
        made = used = path.stat().st_mtime
        summary = {}
        if whole:
            used = (path / SUMMARY).stat().st_mtime
            summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except OSError:
        # Removed in the meantime.
        return None
    return Entry(path, summary, size, now - made, now - max(made, used), whole)


def _to_disk(path: Path) -> None:
    # A rename may reach the disk before the content does; then a crash would leave empty files.
    with path.open("rb") as file:
        os.fsync(file.fileno())
