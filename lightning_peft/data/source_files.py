"""Files while they are read: their formats, and whether they change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_peft.data.reading import Source
from lightning_peft.errors import ConfigError, itemize

log = logging.getLogger(__name__)


def describe_formats(source: Source) -> list[dict[str, Any]]:
    """Returns how each file is read, ready for JSON: ``file``, ``words``, ``encoding`` ..."""
    return [
        {"file": name, "usual": one.is_standard, "words": one.describe(), **asdict(one)}
        for name, one in source.file_formats().items()
    ]


def log_formats(files: Sequence[dict[str, Any]]) -> None:
    """Logs how files are read, as a warning where it was detected and may be wrong."""
    for usual, level in ((True, logging.INFO), (False, logging.WARNING)):
        found = [f"{one['file']}: {one['words']}" for one in files if one["usual"] is usual]
        if found:
            log.log(level, f"Read as:{itemize(found)}")


def file_stamps(sources: Sequence[Source]) -> dict[str, tuple[int, int]]:
    """Returns size in bytes and time of change, in nanoseconds, of each file by its path."""
    paths = [path for source in sources for _, path in source.content()]
    stats = {str(path): path.stat() for path in paths if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def check_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Refuses rows of files that changed while they were read."""
    changed = sorted(path for path in before.keys() | after if before.get(path) != after.get(path))
    if changed:
        names = ", ".join(Path(path).name for path in changed[:5])
        raise ConfigError(
            f"{names} changed while the rows were read, so some would be of the old file and some "
            "of the new one. Start again once it is written; a file that another program still "
            "writes is copied first."
        )
