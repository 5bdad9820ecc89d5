"""Runs on ZeroGPU Spaces, where a GPU is allocated per function call.

The call happens in a process that was forked from this one and given the GPU; a process of the
run's own would have none. So the command line runs inside the call, and writes the folder of the
run as always; the page reads it there. A visitor's quota pays for the requested seconds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from contextvars import Context, copy_context
from importlib import import_module
from pathlib import Path
from typing import Any

from gradio_app.guards import redacted
from gradio_app.runs.environment import training_environment
from gradio_app.runs.local import PROCESS, START_LOG, LocalExecutor
from gradio_app.runs.types import Run
from gradio_app.settings import Settings
from lightning_peft.processes import process_record
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import write_json

EXECUTOR = "zero_gpu"
# Requested GPU time: visitors who are not signed in may not have more at once.
SECONDS = 120
Call = Callable[..., int]
# Like `spaces.GPU`: takes how many seconds each call needs, and returns a decorator.
GpuDecorator = Callable[..., Callable[[Call], Call]]


def train(folder: str, words: list[str], environment: dict[str, str]) -> int:
    """Runs the command line in the process that has the GPU; returns its exit code.

    ``environment`` is all that the run may see of this process's. What is printed goes into a file
    in the run's folder.
    """
    write_json(Path(folder) / PROCESS, process_record(os.getpid()))
    # What the lender has set belongs to the GPU.
    lent = {
        name: value for name, value in os.environ.items() if name.startswith(("CUDA", "NVIDIA"))
    }
    os.environ.clear()
    os.environ.update({**environment, **lent})
    os.chdir(folder)
    with (Path(folder) / START_LOG).open("w", buffering=1, encoding="utf-8") as log:
        # Of Python's streams and of the process: what libraries in C print is for the log too.
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        with redirect_stdout(log), redirect_stderr(log):
            return int(import_module("lightning_peft.cli").main(words))


class ZeroGpuExecutor(LocalExecutor):
    """Runs the command line in calls that are lent a GPU, one at a time.

    ``lender`` decorates the call, by default ``spaces.GPU``; it must fork before it calls. The
    settings' limit of minutes is within the quota.
    """

    def __init__(self, settings: Settings, lender: GpuDecorator | None = None) -> None:
        super().__init__(settings)
        # Here and not later: a Space with ZeroGPU must have such a function when it starts.
        lend = lender if lender is not None else import_module("spaces").GPU
        self._train = lend(duration=SECONDS)(train)
        self._contexts: dict[str, Context] = {}
        self._active_folders: set[Path] = set()

    def on_queued(self, run: Run) -> None:
        """Keeps the context of the event: it decides whose quota pays."""
        self._contexts[run.id] = copy_context()

    def start(self, run: Run) -> None:
        """Starts or resumes a run; returns at once."""
        folder = run.folder
        folder.control.unlink(missing_ok=True)
        (folder.path / PROCESS).unlink(missing_ok=True)
        context = self._contexts.pop(run.id, None) or copy_context()
        given = (folder, self.argv(run))
        self._active_folders.add(folder.path)
        threading.Thread(target=context.run, args=(self._call, *given), daemon=True).start()

    def _call(self, folder: RunFolder, words: list[str]) -> None:
        environment = training_environment(self.settings)
        try:
            self._train(str(folder.path), words, environment)
        except Exception as error:
            # No quota is left, no GPU is free, or the time was over. The message is for
            # the visitor, and may come as a title and a message.
            said = " ".join(str(part) for part in (getattr(error, "title", ""), error) if part)
            with suppress(OSError), (folder.path / START_LOG).open("a", encoding="utf-8") as log:
                log.write(redacted(f"{said or type(error).__name__}\n"))
        finally:
            self._active_folders.discard(folder.path)

    def stop(self, run: Run) -> None:
        """Requests that a run finish its step, save and end."""
        # No signal: the process that has the GPU would take it for its own end.
        run.folder.write(run.folder.control, {"stop": True})

    def in_progress(self, folder: RunFolder) -> bool:
        """Whether the call for a folder is in progress, also while it waits for a GPU."""
        return folder.path in self._active_folders

    def _process(self, folder: RunFolder) -> Any:
        """Returns the process of a run; it outlives the run, and has others after it."""
        return super()._process(folder) if self.in_progress(folder) else None
