"""Incremental, bounded reading of run files while they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradio_app.guards import redacted

LOG_LINES = 200
_TAIL_BYTES = 64 * 1024
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# What no browser should be sent: control characters besides the end of a line and the tab.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

# Adverts of Lightning, kernels that bitsandbytes looks for in vain, and bars of tqdm.
_NOISE = re.compile(
    r"litlogger|LitLogger|Failed to load CPU gemm_4bit_forward|\d+%\|.*\| *[\d.]+\w*/[\d.]+\w* \["
)


def read_json_object(file: Path, *keys: str) -> dict[str, Any]:
    """Returns the object in a JSON file, or the one below its keys; empty where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return object_below(content, *keys)


def object_below(content: object, *keys: str) -> dict[str, Any]:
    """Returns the object below keys; empty where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def number(value: object) -> float | None:
    """Returns a number of a JSON file as a float; ``None`` for everything else."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if known else None  # type: ignore[arg-type]


def read_rows(file: Path, most_bytes: int = 2_000_000) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL file, of a long one only the last.

    Lines that are not whole, or no objects, are passed over.
    """
    for line in _last_lines(file, most_bytes)[:-1]:
        row = parse_row(line)
        if row is not None:
            yield row


def _last_lines(file: Path, most_bytes: int) -> list[bytes]:
    """Returns the last lines of a file, without one that begins before; empty if unreadable."""
    try:
        with file.open("rb") as opened:
            beginning = max(0, opened.seek(0, 2) - most_bytes)
            opened.seek(beginning)
            content = opened.read(most_bytes)
    except OSError:
        return []
    return content.split(b"\n")[1 if beginning else 0 :]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Returns the object that a line of a JSONL file holds, if it holds one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def remove_noise(text: str) -> str:
    """Returns a log without what other libraries write into every one: adverts, finished bars."""
    return "\n".join(line for line in text.split("\n") if not _NOISE.search(line))


def tail(file: Path, lines: int = LOG_LINES) -> str:
    """Returns the last lines of a log as text without colours, control characters and secrets."""
    content = b"\n".join(_last_lines(file, _TAIL_BYTES)).decode("utf-8", errors="replace")
    # Of a progress bar, its last state.
    found = _ESCAPES.sub("", content).split("\n")
    whole = [line.rstrip("\r").rpartition("\r")[2] for line in found]
    cleaned = [_CONTROLS.sub("", line) for line in whole]
    return "\n".join(redacted("\n".join(cleaned).strip("\n")).split("\n")[-lines:])


def cached_text(file: Path) -> str | None:
    """Returns the text of a small file, read again only when it has changed; ``None`` for none."""
    try:
        found = file.stat()
        return _text(file, (found.st_mtime_ns, found.st_size, found.st_ino))
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=2_000)
def _text(file: Path, stamp: tuple[int, int, int]) -> str:
    return file.read_text(encoding="utf-8")
