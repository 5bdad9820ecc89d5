"""Local runs: one process each, which continues when the page is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil
import yaml

from gradio_app.errors import UserError
from gradio_app.runs.environment import training_environment
from gradio_app.runs.files import read_json_object
from gradio_app.runs.types import Executor, Run
from gradio_app.settings import Settings
from lightning_peft.processes import process_record, recorded_process, start_detached
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import Status, write_json

PROCESS = "proc.json"
# What a process prints before it has a log of its own, such as that its config cannot be read.
START_LOG = "start.log"
# After the second interrupt, a process has this long to end by itself.
GRACE_SECONDS = 10.0
# Between the two interrupts: the first one must have been taken.
_SIGNAL_GAP_SECONDS = 0.3

# Always this one, whatever name a recipe gives it: others in the folder are the run's record.
_SKIPPED_ROWS = "left-out.jsonl"


def skipped_rows_file(folder: RunFolder) -> Path:
    """Returns the file that a run writes skipped rows to, with the reasons; it may not exist."""
    return folder.path / _SKIPPED_ROWS


class LocalExecutor(Executor):
    """Starts the command line in processes that belong to no server.

    ``grace`` is the time in seconds between the last interrupt and the end by force.
    """

    uses_this_machine = True

    def __init__(self, settings: Settings, grace: float = GRACE_SECONDS) -> None:
        super().__init__(settings)
        self.grace = grace
        # The server's own children must be waited for, or they stay as zombies.
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        # Of runs that rest nothing changes unless their file does.
        self._resting: dict[Path, tuple[tuple[int, int], Status]] = {}

    def start(self, run: Run) -> None:
        """Starts or resumes a run; returns at once."""
        folder = run.folder.path
        run.folder.control.unlink(missing_ok=True)
        cwd = self.directory(self.settings, folder)
        for record in (run.folder.sweep, run.folder.provenance):
            begun = read_json_object(record).get("directory")
            if isinstance(begun, str) and Path(begun).is_dir():
                # Of the command line, perhaps, which refuses to go on elsewhere.
                cwd = Path(begun)
        with (folder / START_LOG).open("wb") as log:
            self.launch(folder, self.argv(run), cwd, stdout=log)

    @staticmethod
    def directory(settings: Settings, folder: Path) -> Path:
        """Returns the working directory of a run's process."""
        return settings.data_root or folder

    def launch(
        self,
        folder: Path,
        arguments: Sequence[str],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        **streams: IO[bytes],
    ) -> None:
        """Starts the command line in a process of its own, recorded in ``folder``.

        ``env`` is by default that of a training, and ``streams`` are ``stdout``, and ``stderr`` if
        it is another file. Raises UserError if the process cannot be started.
        """
        argv = [*self.settings.command, *arguments]
        env = env or training_environment(self.settings)
        try:
            process = start_detached(argv, cwd, env, **streams)
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise UserError("run.refused_start", why=why) from None
        self._children[process.pid] = process
        write_json(folder / PROCESS, process_record(process.pid))

    def argv(self, run: Run) -> list[str]:
        """Returns the arguments of the command line."""
        folder = run.folder.path
        if run.is_sweep:
            # It was prepared before; what is left is trained.
            return ["sweep", f"--resume={folder}"]
        words = [run.metadata.command]
        if run.metadata.resume:
            words += [f"--resume={folder}"]
        else:
            words += [f"--config={run.folder.recipe}", f"--run_dir={folder}"]
        if "ProgressBar" not in run.recipe_text:
            # A bar would be written to the file some times a second.
            words += ["--trainer.enable_progress_bar=false"]
        if _skips_bad_rows(run.recipe_text):
            words += [f"--data.init_args.skip_bad_rows={skipped_rows_file(run.folder)}"]
        return words

    def stop(self, run: Run) -> None:
        """Requests that a run finish its step, save and end; before its first step, that it end."""
        run.folder.write(run.folder.control, {"stop": True})
        if run.is_sweep or run.status.state == "preparing":
            # The trial of a sweep is saved as after Ctrl-C. A run that is being prepared does not
            # read `control.json` yet; if it has just begun to, this means the same.
            self._signal(run.folder, signal.SIGTERM)

    def save(self, run: Run) -> None:
        """Requests that a run save after its step and continue."""
        run.folder.write(run.folder.control, {"save_now": True})

    def kill(self, run: Run) -> None:
        """Interrupts a run twice, and ends all its processes by force if it is still there."""
        threading.Thread(target=self._kill, args=(run.folder,), daemon=True).start()

    def _kill(self, folder: RunFolder) -> None:
        self._signal(folder, signal.SIGTERM)
        time.sleep(_SIGNAL_GAP_SECONDS)
        self._signal(folder, signal.SIGTERM)
        end = time.monotonic() + self.grace
        while self._process(folder) is not None and time.monotonic() < end:
            time.sleep(0.1)
        self._signal(folder, signal.SIGKILL, group=True)

    def in_progress(self, folder: RunFolder) -> bool:
        """Whether the process that was started last in a folder is there."""
        return self._process(folder) is not None

    def status(self, folder: RunFolder) -> Status | None:
        """Returns the last status of a run, ``"crashed"`` if its process is gone."""
        self._reap()
        try:
            found = folder.status_file.stat()
            stamp = (found.st_mtime_ns, found.st_ino)
            kept = self._resting.get(folder.path)
            if kept is not None and kept[0] == stamp:
                return kept[1]
            status = folder.status
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError, OSError):
            return Status(state="failed", phase="status.json cannot be read")
        if status is not None and status.state in ("stopped", "finished", "failed"):
            self._resting[folder.path] = (stamp, status)
        return status

    def _process(self, folder: RunFolder) -> psutil.Process | None:
        """Returns the process that runs in a folder; never another that has its number now."""
        self._reap()
        started = recorded_process(read_json_object(folder.path / PROCESS))
        status = read_json_object(folder.status_file)
        return started or recorded_process(status, created="process_started")

    def _signal(self, folder: RunFolder, number: int, group: bool = False) -> None:
        process = self._process(folder)
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            # Only a process that leads a group has one that is all its own.
            if group and os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)

    def _reap(self) -> None:
        for pid, process in list(self._children.items()):
            if process.poll() is not None:
                self._children.pop(pid, None)


def _skips_bad_rows(recipe: str) -> bool:
    try:
        content = yaml.safe_load(recipe)
        return content["data"]["init_args"].get("skip_bad_rows") is not None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return False
