"""Export processes of a run, which continue when the page is closed."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from gradio_app.errors import UserError
from gradio_app.export.base_size import BaseSize, base_size, recorded_base
from gradio_app.export.record import (
    FOLDER,
    LOG_FILE,
    OUTPUT,
    REQUEST_FILE,
    RESULT_FILE,
    Export,
    checked_name,
    read_export,
)
from gradio_app.export.request import ExportRequest, find_checkpoint, slug
from gradio_app.guards import inside
from gradio_app.runs.environment import training_environment
from gradio_app.runs.files import read_json_object
from gradio_app.runs.local import PROCESS, LocalExecutor
from gradio_app.runs.store import RunStore
from gradio_app.runs.types import Run
from gradio_app.settings import Settings
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import write_json

# How many exports of a run a public page keeps.
MAX_EXPORTS_ON_SPACE = 4


class ExportManager:
    """Starts, watches and ends exports. What there is to know of them is in the run's folder.

    ``busy`` returns the run that uses this machine, if one does.
    """

    def __init__(self, settings: Settings, store: RunStore, busy: Callable[[], Run | None]) -> None:
        self.settings, self.store, self._busy = settings, store, busy
        self._local = LocalExecutor(settings)
        self._lock = threading.RLock()

    def list(self, run: Run) -> list[Export]:
        """Returns the exports of a run, the newest first."""
        with self._lock:
            try:
                folders = sorted((run.folder.path / FOLDER).iterdir(), reverse=True)
            except OSError:
                return []
            read = [self._read(folder) for folder in folders if not folder.is_symlink()]
        found = [export for export in read if export is not None]
        return sorted(found, key=lambda export: export.created, reverse=True)

    def get(self, owner: str, run_id: object, name: object) -> tuple[Run, Export]:
        """Returns an export and its run; raises UserError if ``owner`` can see none."""
        run = self.store.get(owner, run_id)
        wanted = checked_name(name)
        found = next((export for export in self.list(run) if export.name == wanted), None)
        if found is None:
            raise UserError("export.refused_name", name=wanted)
        return run, found

    def start(self, owner: str, run_id: object, request: ExportRequest) -> Export:
        """Starts an export; one that is to be pushed lists first what would be."""
        with self._lock:
            run = self.store.get(owner, run_id)
            self.check(run, request)
            if self.settings.space and len(self.list(run)) >= MAX_EXPORTS_ON_SPACE:
                raise UserError("export.refused_many", most=MAX_EXPORTS_ON_SPACE)
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            name = f"{stamp}-{request.format}-{secrets.token_hex(2)}"
            folder = inside(run.folder.path, f"{FOLDER}/{name}")
            folder.mkdir(parents=True)
            self._start(run, folder, request, dry_run=True, token=None)
            return self.get(owner, run_id, name)[1]

    def push(self, owner: str, run_id: object, name: object, token: str | None) -> Export:
        """Pushes what an export has listed; raises UserError if it has listed nothing.

        The token says who pushes, on this machine by default whoever is signed in. It is in the
        environment of the process that pushes, and nowhere else.
        """
        with self._lock:
            run, export = self.get(owner, run_id, name)
            if export.state != "asks":
                raise UserError("export.refused_nothing_listed")
            if self.settings.space and not token:
                raise UserError("export.refused_no_token")
            self.check(run, export.request)
            shutil.rmtree(export.output, ignore_errors=True)
            self._start(run, export.folder, export.request, dry_run=False, token=token)
            return self.get(owner, run_id, name)[1]

    def check(self, run: Run, request: ExportRequest) -> None:
        """Raises UserError if something cannot be exported now, with the reason."""
        checkpoint = find_checkpoint(run, request.checkpoint)
        if any(export.active for export in self.list(run)):
            raise UserError("export.refused_one")
        if not request.writes_model:
            return
        busy = self._busy()
        if busy is not None:
            # The model and the run would need the memory of this machine together.
            if busy.owner != run.owner:
                raise UserError("export.refused_busy_other")
            raise UserError("export.refused_busy", name=busy.name)
        _check_size(base_size(checkpoint.folder, self.settings.data_root), self.settings)
        runs = self.store.all() if self.settings.space else self.store.list(run.owner)
        if any(
            one.active and one.request.writes_model for other in runs for one in self.list(other)
        ):
            raise UserError("export.refused_heavy")

    def cancel(self, owner: str, run_id: object, name: object) -> Export:
        """Ends an export; what it has written goes. Raises UserError if it is not going on."""
        with self._lock:
            run, export = self.get(owner, run_id, name)
            if not export.active:
                raise UserError("export.refused_over")
            facts = read_json_object(export.folder / REQUEST_FILE)
            write_json(export.folder / REQUEST_FILE, {**facts, "cancelled": time.time()})
            self._local.kill(replace(run, folder=RunFolder(export.folder)))
            return self.get(owner, run_id, name)[1]

    def delete(self, owner: str, run_id: object, name: object) -> None:
        """Deletes an export from this machine; what was pushed stays on the hub."""
        with self._lock:
            run, export = self.get(owner, run_id, name)
            if export.active:
                raise UserError("export.refused_going")
            shutil.rmtree(inside(run.folder.path / FOLDER, export.name))

    def _start(
        self, run: Run, folder: Path, request: ExportRequest, dry_run: bool, token: str | None
    ) -> None:
        for left in (RESULT_FILE, PROCESS):
            (folder / left).unlink(missing_ok=True)
        adapter = f"{slug(run)}={find_checkpoint(run, request.checkpoint).folder}"
        named = replace(request, base_name=self._base_name(run, request))
        argv = named.argv(adapter, folder / OUTPUT, dry_run)
        # As for training: a base can be named from there.
        cwd = self.settings.data_root or run.folder.path
        environment = pusher_environment(self.settings, token)
        with (folder / LOG_FILE).open("wb") as log, (folder / RESULT_FILE).open("wb") as result:
            self._local.launch(folder, argv, cwd, environment, stdout=result, stderr=log)
        record = {"wish": asdict(request), "run_name": slug(run), "created": time.time()}
        write_json(folder / REQUEST_FILE, record)

    def _base_name(self, run: Run, request: ExportRequest) -> str:
        """Returns the name of the base in files: on a Space, never a folder of the server."""
        base, _ = recorded_base(find_checkpoint(run, request.checkpoint).folder)
        if request.base_name or not (self.settings.space and Path(base).is_absolute()):
            return request.base_name
        return run.redactor.text(base)

    def _read(self, folder: Path) -> Export | None:
        in_progress = self._local.in_progress(RunFolder(folder))
        if not in_progress and folder.is_dir():
            # What a process that was ended could not take away itself.
            for left in folder.glob(f".incomplete-*-{OUTPUT}"):
                shutil.rmtree(left, ignore_errors=True)
        return read_export(folder, in_progress)


def _check_size(size: BaseSize | None, settings: Settings) -> None:
    """Refuses a model that is too large for a public page, or for the disk."""
    most = settings.limits.parameters
    if size is None:
        if most is not None:
            raise UserError("export.refused_unknown")
        return
    if most is not None and size.parameters > most:
        billions = f"{size.parameters / 1e9:.2g}"
        raise UserError("export.refused_large", billions=billions, most=f"{most / 1e9:.2g}")
    # One that is written, and one that is being finished.
    free = shutil.disk_usage(settings.runs).free
    if 2 * size.merged_bytes > free:
        needed = f"{2 * size.merged_bytes / 1e9:.1f}"
        raise UserError("export.refused_disk", needed=needed, free=f"{free / 1e9:.1f}")


def pusher_environment(settings: Settings, token: str | None) -> dict[str, str]:
    """Returns the environment of a process that exports, with a token if it pushes."""
    environment = training_environment(settings)
    if token:
        environment["HF_TOKEN"] = token
        # On a Space no token is used implicitly; this one was given for the push.
        environment.pop("HF_HUB_DISABLE_IMPLICIT_TOKEN", None)
    return environment
