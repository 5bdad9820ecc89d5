"""Command line of the chat process for a run, and redaction of its output for visitors."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from gradio_app.errors import UserError
from gradio_app.guards import redacted
from gradio_app.redaction import Redactor
from gradio_app.runs.environment import training_environment
from gradio_app.runs.files import read_json_object, tail
from gradio_app.runs.run_task import task_of_run
from gradio_app.runs.types import Checkpoint, Run
from gradio_app.settings import Settings
from lightning_peft.processes import LineProcess

# Adapters take memory too; which others are loaded with the requested one.
MOST_ADAPTERS = 4
_MAX_MESSAGE = 600
_LAST_LINES = 3


class ModelProcess(LineProcess):
    """A process of ``lightning-peft chat --serve``."""

    def __init__(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        # A file: a pipe that nobody reads would fill and block the process.
        self._errors = tempfile.NamedTemporaryFile(prefix="lightning-peft-chat-")  # noqa: SIM115
        super().__init__(argv, cwd, env, self._errors)

    @property
    def resident_bytes(self) -> int:
        """Main memory that it holds now."""
        try:
            return int(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def last_output(self) -> str:
        """Returns the last lines of its error output, redacted."""
        return tail(Path(self._errors.name), _LAST_LINES)


def start_chat_process(
    settings: Settings, run: Run, *checkpoints: str
) -> tuple[ModelProcess, dict[str, str]]:
    """Starts the process for a run; returns it with the names of the checkpoints in it.

    Raises UserError if there is no such checkpoint, if two of them cannot share a base, or the
    process cannot be started.
    """
    chosen = _select_checkpoints(run, checkpoints)
    # Names of our own: those of folders could hold what a command line or a module cannot.
    names = {one.name: f"checkpoint-{number}" for number, one in enumerate(chosen, 1)}
    words = [*settings.command, "chat", "--serve"]
    words += [f"{names[one.name]}={one.folder.resolve()}" for one in chosen]
    folder = settings.data_root or run.folder.path
    try:
        return ModelProcess(words, folder, training_environment(settings)), names
    except OSError as error:
        raise UserError("run.refused_start", why=error.strerror or type(error).__name__) from None


def _select_checkpoints(run: Run, names: Sequence[str]) -> list[Checkpoint]:
    known = run.checkpoints()
    wanted = [one for one in known if one.name in names]
    if missing := set(names) - {one.name for one in wanted}:
        raise UserError("playground.refused_checkpoint", name=min(missing))
    # Copies of trained layers cannot share a base.
    whole = any(
        read_json_object(one.folder / "adapter_config.json").get("modules_to_save") for one in known
    )
    if whole and len(wanted) > 1:
        raise UserError("playground.refused_together")
    others = [] if whole else [one for one in known if one not in wanted]
    return [*wanted, *others][:MOST_ADAPTERS]


def redact_message(text: object, settings: Settings) -> str:
    """Returns a message of the process, shortened, without secrets or paths of a Space."""
    found = Redactor(settings).text(redacted(str(text)))
    return found if len(found) <= _MAX_MESSAGE else found[: _MAX_MESSAGE - 1] + "\u2026"


def sees_images(run: Run) -> bool:
    """Returns whether a run trains a model that is asked about images."""
    task = task_of_run(run)
    return task is not None and task.sees


def unsupported_task(run: Run) -> str:
    """Returns the class of the task that a run trains, if it is one that cannot chat.

    A classifier has no answer to give. Empty for a user's own task: its base may well be a language
    model, and loading it indicates whether it is.
    """
    task = task_of_run(run)
    return task.class_name if task is not None and not task.chats else ""
