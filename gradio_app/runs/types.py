"""Snapshots of runs, and the executor interface."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from gradio_app.redaction import Redactor
from gradio_app.runs.files import read_json_object
from gradio_app.runs.metadata import RunMetadata
from gradio_app.settings import Settings
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import ACTIVE, Status


@dataclass(frozen=True)
class Checkpoint:
    """Saved adapters: a folder, its name such as ``"best"``, and the optimizer step if known."""

    name: str
    step: int | None
    folder: Path


@dataclass(frozen=True)
class Run:
    """A run as it is at a moment; the id is the name of its folder.

    Its status is ``"queued"`` while it waits, and ``"crashed"`` if its process is gone. The
    redactor is for what it has written.
    """

    id: str
    folder: RunFolder
    metadata: RunMetadata
    status: Status
    redactor: Redactor = Redactor()

    name = property(lambda self: self.metadata.name or self.id)
    owner = property(lambda self: self.metadata.owner)
    created = property(lambda self: self.metadata.created or self.status.started)
    active = property(lambda self: self.status.state in ACTIVE)
    waiting = property(lambda self: self.metadata.waiting is not None)

    @property
    def is_sweep(self) -> bool:
        """Whether it is a sweep; one of the command line is known by its file alone."""
        return self.metadata.command == "sweep" or self.folder.sweep.is_file()

    @property
    def recipe_text(self) -> str:
        """Its recipe, redacted; once it has begun, with all defaults."""
        try:
            text = self.folder.recipe.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return self.redactor.record(text)

    @property
    def can_resume(self) -> bool:
        """Whether it can be resumed from a checkpoint; a sweep, with the trials that are left."""
        resting = self.status.state in ("stopped", "failed", "crashed")
        if self.is_sweep:
            return resting and self.folder.sweep.is_file()
        return resting and self.status.kind == "fit" and self.folder.newest_checkpoint() is not None

    @property
    def checkpoint_step(self) -> int:
        """Step from which it would be resumed."""
        newest = self.folder.newest_checkpoint()
        steps = {one.name: one.step for one in self.checkpoints()}
        step = steps.get(newest.stem) if newest is not None else None
        return self.status.step if step is None else step

    @property
    def bytes(self) -> int:
        """Its size on disk, with exports; what is being deleted does not count."""
        total = 0
        for folder, _, names in os.walk(self.folder.path):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    def checkpoints(self) -> list[Checkpoint]:
        """Returns the saved adapters: the best ones first, then the newest."""
        found = []
        for file in (self.folder.checkpoints / "adapters").glob("*/adapter_model.safetensors"):
            step = read_json_object(file.with_name("provenance.json")).get("global_step")
            step = step if isinstance(step, int) else None
            found.append(Checkpoint(file.parent.name, step, file.parent))
        return sorted(found, key=lambda one: (not one.name.startswith("best"), -(one.step or 0)))


class Executor(ABC):
    """A place where runs are executed; safe to call from any thread.

    Runs are read from their folders, so an executor for another place brings their files here.
    """

    # Whether runs here share this machine, so that they wait for one another.
    uses_this_machine: bool

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_queued(self, run: Run) -> None:  # noqa: B027
        """Called when a run is queued, in the event of the visitor who queues it."""

    @abstractmethod
    def start(self, run: Run) -> None:
        """Starts or resumes a run and returns at once; raises UserError if that is not possible."""

    @abstractmethod
    def stop(self, run: Run) -> None:
        """Requests that a run finish its step, save and end; returns at once."""

    @abstractmethod
    def save(self, run: Run) -> None:
        """Requests that a run save after its step and continue."""

    @abstractmethod
    def kill(self, run: Run) -> None:
        """Ends a run at once, if need be by force; returns at once."""

    def active(self, run: Run) -> bool:
        """Whether a run is being executed."""
        return self.in_progress(run.folder)

    @abstractmethod
    def in_progress(self, folder: RunFolder) -> bool:
        """The same for a run that has not written its status since it was started."""

    @abstractmethod
    def status(self, folder: RunFolder) -> Status | None:
        """Returns the last status of a run, ``"crashed"`` if its process is gone.

        ``None`` before it has written any.
        """
