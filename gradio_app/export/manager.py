"""The exports of a run: each a process of its own, which continues when the page is closed."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from gradio_app.errors import UserError
from gradio_app.export import limits
from gradio_app.export.base_size import base_size, recorded_base
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


class ExportManager:
    """Starts, watches and ends exports. What there is to know of them is in the run's folder.

    Args:
        settings: What the server was started with.
        store: All runs.
        busy: Returns the run that uses this machine, if one does.
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
            found = [self._read(folder) for folder in folders if not folder.is_symlink()]
        return sorted(
            (export for export in found if export is not None),
            key=lambda export: export.created,
            reverse=True,
        )

    def get(self, owner: str, run_id: object, name: object) -> tuple[Run, Export]:
        """Returns an export and its run.

        Raises:
            UserError: If there is none that ``owner`` can see.
        """
        run = self.store.get(owner, run_id)
        wanted = checked_name(name)
        found = next((export for export in self.list(run) if export.name == wanted), None)
        if found is None:
            raise UserError("export.refused_name", name=wanted)
        return run, found

    def start(self, owner: str, run_id: object, request: ExportRequest) -> Export:
        """Starts an export; one that is to be pushed lists first what would be.

        Raises:
            UserError: If it cannot be had now.
        """
        with self._lock:
            run = self.store.get(owner, run_id)
            self.check(run, request)
            limits.check_count(self.list(run), self.settings)
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            name = f"{stamp}-{request.format}-{secrets.token_hex(2)}"
            folder = inside(run.folder.path, f"{FOLDER}/{name}")
            folder.mkdir(parents=True)
            self._start(run, folder, request, dry_run=True, token=None)
            return self.get(owner, run_id, name)[1]

    def push(self, owner: str, run_id: object, name: object, token: str | None) -> Export:
        """Pushes what an export has listed.

        Args:
            owner: Whose run it is.
            run_id: Which run.
            name: Name of the export.
            token: Who pushes; ``None`` for whoever this machine is signed in as. It is in the
                environment of the process that pushes, and nowhere else.

        Raises:
            UserError: If there is nothing to push, or no account to push from.
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
        """Refuses what cannot be exported now.

        Raises:
            UserError: If it cannot, with the reason.
        """
        checkpoint = find_checkpoint(run, request.checkpoint)
        if any(export.active for export in self.list(run)):
            raise UserError("export.refused_one")
        if not request.writes_model:
            return
        limits.check_machine(self._busy(), run.owner)
        size = base_size(checkpoint.folder, self.settings.data_root)
        limits.check_size(size, self.settings)
        runs = self.store.all() if self.settings.space else self.store.list(run.owner)
        if any(
            one.active and one.request.writes_model for other in runs for one in self.list(other)
        ):
            raise UserError("export.refused_heavy")

    def cancel(self, owner: str, run_id: object, name: object) -> Export:
        """Ends an export; what it has written goes.

        Raises:
            UserError: If it is not going on.
        """
        with self._lock:
            run, export = self.get(owner, run_id, name)
            if not export.active:
                raise UserError("export.refused_over")
            facts = read_json_object(export.folder / REQUEST_FILE)
            write_json(export.folder / REQUEST_FILE, {**facts, "cancelled": time.time()})
            self._local.kill(replace(run, folder=RunFolder(export.folder)))
            return self.get(owner, run_id, name)[1]

    def delete(self, owner: str, run_id: object, name: object) -> None:
        """Deletes an export from this machine; what was pushed stays on the hub.

        Raises:
            UserError: If it is going on.
        """
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


def pusher_environment(settings: Settings, token: str | None) -> dict[str, str]:
    """Returns the environment of a process that exports, with a token if it pushes."""
    environment = training_environment(settings)
    if token:
        environment["HF_TOKEN"] = token
        # On a Space no token is used implicitly; this one was given for the push.
        environment.pop("HF_HUB_DISABLE_IMPLICIT_TOKEN", None)
    return environment
