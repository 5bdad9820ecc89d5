"""Run store: the runs on disk, and who may see which."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from gradio_app.errors import UserError
from gradio_app.guards import checked_run_id, inside, redacted
from gradio_app.redaction import Redactor
from gradio_app.runs import metadata as run_metadata
from gradio_app.runs.files import cached_text, read_json_object
from gradio_app.runs.local import LocalExecutor
from gradio_app.runs.metadata import LOCAL, METADATA_FILE, RunMetadata
from gradio_app.runs.types import Executor, Run
from gradio_app.settings import Settings
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import Status, write_json

NAME_LENGTH = 80
MAX_TAGS, TAG_LENGTH = 10, 30
NOTES_LENGTH = 2_000
# Folder below the root with runs that were deleted, and how long they can be restored.
DELETED, RESTORABLE_SECONDS = ".deleted", 3600.0
# A run is said to be launched just before its process is there.
_LAUNCHING_SECONDS = 3.0


class RunStore:
    """All runs below one folder.

    ``executors`` are by name, the one for new runs first; by default the local one.
    """

    def __init__(self, settings: Settings, executors: Mapping[str, Executor] | None = None) -> None:
        self.settings = settings
        self.root = settings.runs
        self.executors = executors or {LOCAL: LocalExecutor(settings)}

    def list(self, owner: str) -> Sequence[Run]:
        """Returns the runs that ``owner`` may see, the newest first."""
        return [run for run in self.all() if run.owner == owner]

    def all(self) -> Sequence[Run]:
        """Returns the runs of everyone, the newest first: for the queue, never for a page."""
        return self._runs_in(self.root)

    def deleted(self, owner: str) -> Sequence[Run]:
        """Returns the runs that ``owner`` can restore, the newest first."""
        return [run for run in self._runs_in(self._deleted) if run.owner == owner]

    def recipes(self, owner: str) -> str:
        """Returns the recipes of all runs of ``owner``, also of deleted ones.

        Raises OSError where one cannot be read now: it may name any file.
        """
        # The deleted ones first: a run that is restored meanwhile is in both lists.
        runs = [*self.deleted(owner), *self.list(owner)]
        texts = [run.recipe_text for run in runs]
        if not all(texts):
            raise OSError(f"The recipe of run {runs[texts.index('')].id} cannot be read.")
        return "\n".join(texts)

    def _runs_in(self, root: Path) -> Sequence[Run]:
        try:
            names = [path.name for path in root.iterdir() if path.is_dir()]
        except OSError:
            return []
        found = [run for name in names if (run := self._read(name, root)) is not None]
        return sorted(found, key=lambda run: (run.created, run.id), reverse=True)

    def get(self, owner: str, run_id: object) -> Run:
        """Returns a run; raises the same UserError for none and for another owner's."""
        name = checked_run_id(run_id)
        run = self._read(name)
        if run is None or run.owner != owner:
            raise UserError("errors.no_such_run", run=name)
        return run

    def create(self, owner: str, recipe: str, name: str) -> Run:
        """Makes the folder of a new run of a checked recipe; ``RunQueue.add`` starts it."""
        folder = RunFolder.create(self.root, checked_name(name))
        folder.recipe.write_text(recipe, encoding="utf-8")
        where = next(iter(self.executors))
        metadata = RunMetadata(owner, checked_name(name), time.time(), where=where)
        run_metadata.update(folder.path, metadata)
        return self.get(owner, folder.path.name)

    def distinct_name(self, owner: str, name: str) -> str:
        """Returns a name, with a number if another run of the owner has it."""
        name, taken = checked_name(name), {run.name for run in self.list(owner)}
        if name not in taken:
            return name
        return next_name(name[: NAME_LENGTH - 5], taken)

    def rename(self, owner: str, run_id: str, name: str) -> Run:
        """Gives a run another name; its id stays."""
        return self.update_metadata(self.get(owner, run_id), name=checked_name(name))

    def describe(self, owner: str, run_id: str, name: str, tags: str, notes: str) -> Run:
        """Gives a run a name, tags separated by commas, and notes; its id stays."""
        run = self.get(owner, run_id)
        name, notes = checked_name(name), checked_notes(notes)
        return self.update_metadata(run, name=name, tags=checked_tags(tags), notes=notes)

    def delete(self, owner: str, run_id: str) -> None:
        """Moves a run to the deleted ones, unless it or an export of it is active.

        For an hour it can be restored; then it is erased with everything it has saved.
        """
        path = self._resting(owner, run_id)
        self.erase_deleted()
        self._deleted.mkdir(exist_ok=True)
        name, taken = path.name, {one.name for one in self._deleted.iterdir()}
        if name in taken:
            # A folder of that name was made once more: both can be restored.
            name = next_name(name[: NAME_LENGTH - 5], {*taken, *os.listdir(self.root)})
        os.utime(path)
        path.rename(self._deleted / name)

    def restore(self, owner: str, run_id: object) -> Run:
        """Takes a deletion back; a run that waited does not wait any more.

        Raises the same UserError for none and for another owner's.
        """
        run = self._deleted_run(owner, run_id)
        if (self.root / run.id).exists():
            raise UserError("run.refused_restore", run=run.id)
        run.folder.path.rename(self.root / run.id)
        found = self.get(owner, run.id)
        return self.update_metadata(found, waiting=None) if found.waiting else found

    def erase_now(self, owner: str, run_id: object) -> None:
        """Erases a deleted run before its hour is over; raises as :meth:`restore` does."""
        shutil.rmtree(self._deleted_run(owner, run_id).folder.path)

    def _deleted_run(self, owner: str, run_id: object) -> Run:
        name = checked_run_id(run_id)
        run = self._read(name, self._deleted)
        if run is None or run.owner != owner or run.folder.path.is_symlink():
            raise UserError("errors.no_such_run", run=name)
        return run

    def erase(self, owner: str, run_id: str) -> None:
        """Deletes a run for good, as :meth:`delete` does at first."""
        shutil.rmtree(self._resting(owner, run_id))

    def erase_deleted(self, seconds: float = RESTORABLE_SECONDS) -> None:
        """Erases what was deleted so long ago."""
        for path in self._deleted.iterdir() if self._deleted.is_dir() else ():
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime >= seconds:
                    shutil.rmtree(path)

    @property
    def _deleted(self) -> Path:
        return self.root / DELETED

    def _resting(self, owner: str, run_id: str) -> Path:
        """Returns the folder of a run that nothing uses; raises UserError otherwise."""
        run = self.get(owner, run_id)
        if run.active or self.executor(run).active(run):
            raise UserError("run.refused_active", name=run.name)
        here = self.executors[LOCAL]
        exports = (run.folder.path / "exports").glob("*")
        if any(here.in_progress(RunFolder(path)) for path in exports):
            raise UserError("export.refused_delete", name=run.name)
        path = inside(self.root, run.id)
        # A link in place of a folder would lead out of the root.
        if path.parent != self.root.resolve() or (self.root / run.id).is_symlink():
            raise UserError("errors.no_such_run", run=run.id)
        return path

    def mark_stopped(self, owner: str, run_id: str) -> Run:
        """Writes down that a crashed run is stopped; raises UserError if it has not crashed."""
        run = self.get(owner, run_id)
        if run.status.state != "crashed" or self.executor(run).active(run):
            raise UserError("run.refused_not_crashed", name=run.name)
        newest = run.folder.newest_checkpoint()
        place = newest.relative_to(run.folder.path).as_posix() if newest else None
        content = read_json_object(run.folder.status_file)
        changes = {"state": "stopped", "phase": "marked as stopped", "checkpoint": place}
        write_json(run.folder.status_file, {**content, **changes})
        return self.get(owner, run_id)

    def update_metadata(self, run: Run, **changes: Any) -> Run:
        """Changes what the page knows of a run; see :class:`RunMetadata`."""
        run_metadata.update(run.folder.path, run.metadata, **changes)
        return self.get(run.owner, run.id)

    def executor(self, run: Run) -> Executor:
        """Returns the executor of a run."""
        return self._executor(run.metadata)

    def _executor(self, metadata: RunMetadata) -> Executor:
        return self.executors.get(metadata.where) or self.executors[LOCAL]

    def _read(self, name: str, root: Path | None = None) -> Run | None:
        path = (root or self.root) / name
        folder = RunFolder(path)
        text = cached_text(path / METADATA_FILE)
        if text is None and not folder.status_file.is_file():
            return None
        try:
            metadata = RunMetadata(name=name) if text is None else run_metadata.parse(text)
            executor = self._executor(metadata)
            checked_run_id(name)
            redactor = Redactor(self.settings, path)
            status = redactor.status(_derive_status(folder, metadata, executor))
            return Run(name, folder, metadata, status, redactor)
        except (UserError, ValueError, TypeError, KeyError):
            # Somebody else's folder, or a file that no version of this page writes.
            return None


def checked_name(text: object) -> str:
    """Returns ``text`` as the name of a run, on one line; raises UserError if none is left."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    name = redacted(line)[:NAME_LENGTH].strip()
    if not name:
        raise UserError("run.refused_name")
    return name


def checked_tags(text: object) -> tuple[str, ...]:
    """Returns tags that are separated by commas, each once; raises UserError for too many."""
    words = ("-".join(one.strip().lstrip("#").split()) for one in str(text or "").split(","))
    shown = ("".join(c for c in redacted(one) if c.isprintable())[:TAG_LENGTH] for one in words)
    tags = tuple(dict.fromkeys(filter(None, shown)))
    if len(tags) > MAX_TAGS:
        raise UserError("run.refused_tags", most=MAX_TAGS)
    return tags


def checked_notes(text: object) -> str:
    """Returns ``text`` as the notes of a run: lines without what no browser should be sent."""
    lines = "\n".join(str(text or "").splitlines())
    # Tabs and spaces of other widths are not printable, and part words all the same.
    spaced = "".join(c if c == "\n" or not c.isspace() else " " for c in lines)
    shown = "".join(c for c in spaced if c.isprintable() or c == "\n")
    return redacted(shown)[:NOTES_LENGTH].strip()


def next_name(name: str, taken: Collection[str]) -> str:
    """Returns the name of a copy: the name with the next number that is not taken."""
    stem, dash, number = name.rpartition("-")
    stem = stem if dash and number.isdecimal() and len(number) < 4 else name
    return next(f"{stem}-{n}" for n in count(2) if f"{stem}-{n}" not in taken)


def _derive_status(folder: RunFolder, metadata: RunMetadata, executor: Executor) -> Status:
    """Returns the state of a run, from its own status, its process and the queue.

    ``status.json`` is of the last process that wrote it. A run that waits, or was just started,
    has not written it yet.
    """
    written = executor.status(folder)
    if metadata.waiting is not None:
        before = written or Status()
        return replace(before, state="queued", phase="waiting in line", eta_seconds=None)
    if metadata.launched is None:
        return written or Status(state="queued", phase="not started")
    if written is None or written.started < metadata.launched:
        return _unwritten_status(folder, metadata, executor)
    if metadata.resume and not written.step:
        # A resumed run counts from its checkpoint once its first step is done.
        written = replace(written, step=metadata.from_step)
    if written.state == "crashed" and (metadata.kill_asked or metadata.stop_asked):
        return replace(written, state="stopped", phase="stopped at once")
    return written


def _unwritten_status(folder: RunFolder, metadata: RunMetadata, executor: Executor) -> Status:
    assert metadata.launched is not None
    here = Status(step=metadata.from_step, started=metadata.launched, updated=metadata.launched)
    launching = time.time() - metadata.launched < _LAUNCHING_SECONDS
    if executor.in_progress(folder) or (launching and not metadata.kill_asked):
        return replace(here, state="preparing", phase="starting")
    if metadata.kill_asked or metadata.stop_asked:
        return replace(here, state="stopped", phase="stopped at once")
    return replace(here, state="failed", phase="failed before it began")
