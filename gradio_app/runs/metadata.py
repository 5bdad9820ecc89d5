"""Metadata kept by the page in ``app.json`` of the run folder."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from gradio_app.visitors import LOCAL
from lightning_peft.runs.status import write_json

METADATA_FILE = "app.json"
_lock = threading.Lock()


@dataclass(frozen=True)
class RunMetadata:
    """What ``app.json`` holds. Times are seconds since 1970.

    Attributes:
        owner: Who may see the run, see ``visitors.owner_of``.
        name: What its owner calls it.
        created: When it was requested.
        command: The subcommand that runs it.
        where: Name of the executor that it was, or will be, started by.
        waiting: Its place in the queue, the lowest first; ``None`` if it does not wait.
        resume: Whether it waits to be resumed, rather than to begin.
        from_step: Optimizer steps that were done when it was resumed.
        launched: When its process was started last.
        stop_asked: When it was asked to stop and save since then.
        kill_asked: When it got the request to stop at once since then.
        out_of_time: Whether it was stopped because it took longer than a run may take.
        tags: Words by which its owner finds it.
        notes: What its owner writes about it.
    """

    owner: str = LOCAL
    name: str = ""
    created: float = 0.0
    command: str = "fit"
    where: str = LOCAL
    waiting: float | None = None
    resume: bool = False
    from_step: int = 0
    launched: float | None = None
    stop_asked: float | None = None
    kill_asked: float | None = None
    out_of_time: bool = False
    tags: tuple[str, ...] = ()
    notes: str = ""


def parse(text: str) -> RunMetadata:
    """Parses an ``app.json``; keys of later versions are ignored."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("app.json holds no object")
    known = {field.name for field in fields(RunMetadata)}
    metadata = RunMetadata(**{name: value for name, value in content.items() if name in known})
    if not isinstance(metadata.tags, (list, tuple)):
        raise ValueError("app.json holds values of other kinds")
    metadata = replace(metadata, tags=tuple(metadata.tags))
    words = (metadata.owner, metadata.name, metadata.command, metadata.where, metadata.notes)
    times = (metadata.created, metadata.waiting, metadata.from_step, metadata.launched)
    if not all(isinstance(word, str) for word in (*words, *metadata.tags)) or not all(
        number is None or isinstance(number, (int, float)) for number in times
    ):
        raise ValueError("app.json holds values of other kinds")
    return metadata


def update(folder: Path, metadata: RunMetadata, **changes: Any) -> RunMetadata:
    """Changes the metadata of a run on disk, and returns all of it."""
    with _lock:
        file = folder / METADATA_FILE
        if file.is_file():
            metadata = parse(file.read_text(encoding="utf-8"))
        metadata = replace(metadata, **changes)
        write_json(file, asdict(metadata))
    return metadata
