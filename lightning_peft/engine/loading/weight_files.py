"""Weight files of ``from_pretrained``, and their content.

A hash of all bytes identifies what a file holds, wherever and whenever it was copied. It is
remembered for a file of this path, size, inode, and times of modification and of change to the
nanosecond. No program can set the last one, so a file that was written over with its old time is
read again; and nothing is remembered of a file that changed so short a time before it was read that
the clock of the file system could show the next change as the same moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lightning_peft.compat.transformers import file_on_this_machine
from lightning_peft.engine.loading.gguf_model import read_gguf_folder

# Arguments that locate a file.
_WHERE = ("revision", "cache_dir", "token")
# Coarser than the clock of any file system that weights are on.
_SETTLED_NS = 2_000_000_000
_BLOCK = 1 << 22
_AT_ONCE = 4

Stamp = tuple[str, int, int, int, int]


def find_weight_files(name: Any, options: Mapping[str, Any]) -> list[Path]:
    """Returns the real paths of a model's safetensors files, or GGUF file, on this machine.

    In order; empty where it is not certain that these would be read.
    """
    where = {key: options[key] for key in _WHERE if options.get(key) is not None}
    gguf = read_gguf_folder(name)
    if gguf is not None:
        return [gguf.file.resolve()] if gguf.file.is_file() else []
    try:
        index = _on_this_machine(name, SAFE_WEIGHTS_INDEX_NAME, where)
        single = _on_this_machine(name, SAFE_WEIGHTS_NAME, where)
        if single is not None:
            return [single.resolve()]
        if index is None:
            return []
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        found = [_on_this_machine(name, part, where) for part in parts]
    except (OSError, ValueError, KeyError, AttributeError):
        return []
    return [path.resolve() for path in found if path is not None] if None not in found else []


def _on_this_machine(name: Any, file: str, where: Mapping[str, Any]) -> Path | None:
    if os.path.isdir(name):
        path = Path(name) / file
        return path if path.is_file() else None
    return file_on_this_machine(str(name), file, **where)


def stamps(files: Iterable[Path]) -> list[Stamp]:
    """Stamps of files, which change when a file does."""
    return [_stamp(path) for path in files]


def _stamp(path: Path) -> Stamp:
    facts = path.stat()
    return (str(path), facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns)


def hashes(files: Iterable[Path], memory: Path) -> list[str]:
    """Returns the sha256 of each file."""
    # hashlib lets other threads run.
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: _hash(path, memory), files))


def _hash(path: Path, memory: Path) -> str:
    before = _stamp(path)
    note = memory / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    known = _remembered(note)
    if known.get("stamp") == list(before):
        return str(known["sha256"])
    started = time.time_ns()
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            total.update(block)
    if _stamp(path) != before:
        raise OSError(f"{path} changed while it was read")
    if started - max(before[3:]) > _SETTLED_NS:
        _remember(note, {"stamp": before, "sha256": total.hexdigest()})
    return total.hexdigest()


def _remembered(note: Path) -> dict[str, Any]:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("sha256"), str) else {}


def _remember(note: Path, known: dict[str, Any]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=note.parent)
    except OSError:
        # A cache that cannot be written to; then files are read again.
        return
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(known, file)
        os.replace(temporary, note)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
