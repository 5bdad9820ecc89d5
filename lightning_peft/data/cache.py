"""Prepared data on disk, keyed by everything that decides what it is.

An entry is a folder that appears with its whole content, by one rename, or not at all. Runs that
prepare the same data at the same time each write their own; the first to finish is kept, and they
are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised whenever the same input is prepared in another way.
FORMAT = 1
SUMMARY = "summary.json"

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Returns where prepared data is kept unless the user says otherwise."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lightning-peft" / "data"


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Returns a hash of the names and bytes of files."""
    total = hashlib.sha256()
    for name, path in files:
        one = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                one.update(block)
        total.update(json.dumps([name, one.hexdigest()]).encode())
    return total.hexdigest()


def digest_of_rows(rows: Iterable[Any]) -> str:
    """Returns a hash of rows, for data of which there is no file."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, default=repr, sort_keys=True).encode("utf-8"))
    return total.hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of all that decides how ``tokenizer`` tokenizes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer("a b")["input_ids"],
        version("transformers"),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def key_of(**parts: Any) -> str:
    """Returns the name of the entry that ``parts`` decide."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def entry(folder: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """Returns the folder of an entry, which is built first if it is not there.

    Args:
        folder: The cache.
        key: From :func:`key_of`.
        build: Writes the files into a folder, and returns the summary that goes beside them.

    Raises:
        ConfigError: If nothing can be written there.
    """
    final = folder / key
    damage = damage_of(final) if final.exists() else None
    if final.exists() and damage is None:
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if damage is not None:
            log.warning("The prepared data in %s is damaged (%s); it is made anew.", final, damage)
            shutil.rmtree(final, ignore_errors=True)
        working = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder))
    except OSError as error:
        raise ConfigError(
            f"Prepared data cannot be kept in {str(folder)!r}: {error.strerror or error}. Name a "
            "folder that can be written to with cache_dir=."
        ) from error
    try:
        summary = build(working)
        summary["files"] = {path.name: path.stat().st_size for path in sorted(working.iterdir())}
        (working / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
        for path in working.iterdir():
            _to_disk(path)
        try:
            working.rename(final)
        except OSError:
            # Another run was faster.
            if damage_of(final) is not None:
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return final


def damage_of(final: Path) -> str | None:
    """Returns what is wrong with an entry, or ``None``."""
    try:
        summary = json.loads((final / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{SUMMARY}: {error}"
    for name, size in summary["files"].items():
        path = final / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is not the {size} bytes that were written"
    return None


def _to_disk(path: Path) -> None:
    # A rename may reach the disk before the content does; then a crash would leave empty files.
    with path.open("rb") as file:
        os.fsync(file.fileno())
