"""Where a run is carried out: the interface, and those that the settings allow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from gradio_app.settings import Settings
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import Status

if TYPE_CHECKING:
    from gradio_app.runs.store import Run


class Executor(Protocol):
    """A place that carries out runs. All of it is safe to call from any thread.

    What a run does is read from its folder, wherever it is carried out: an executor for another
    place brings the files here.
    """

    # Whether runs here share this machine, so that they wait for one another.
    uses_this_machine: bool

    def on_queued(self, run: Run) -> None:
        """Told of a run that is put into the line, in the event of the visitor who asks for it."""

    def start(self, run: Run) -> None:
        """Starts a run, or lets it go on if ``run.metadata.resume``; returns at once.

        Raises:
            UserError: If it cannot be started.
        """

    def stop(self, run: Run) -> None:
        """Asks a run to finish its step, save, and end; returns at once."""

    def save(self, run: Run) -> None:
        """Asks a run to save after its step, and go on."""

    def kill(self, run: Run) -> None:
        """Ends a run at once, by force if need be; returns at once."""

    def active(self, run: Run) -> bool:
        """Says whether a run is being carried out."""

    def in_progress(self, folder: RunFolder) -> bool:
        """Says the same of a run that has not written its status since it was started."""

    def status(self, folder: RunFolder) -> Status | None:
        """Returns what a run wrote last, ``"crashed"`` if it is gone without a word.

        ``None`` before it has written anything.
        """


def executors_of(settings: Settings) -> dict[str, Executor]:
    """Returns the executors of a server by name, the one for new runs first."""
    # Not at the top: an executor reads the store's types.
    local = import_module("gradio_app.runs.local").LocalExecutor(settings)
    found: dict[str, Executor] = {}
    if settings.zero_gpu:
        zero = import_module("gradio_app.runs.zero_gpu")
        found[zero.EXECUTOR] = zero.ZeroGpuExecutor(settings)
    found["local"] = local
    if settings.space:
        jobs = import_module("gradio_app.runs.hf_jobs")
        found[jobs.EXECUTOR] = jobs.JobsExecutor()
    return found
