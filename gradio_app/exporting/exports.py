"""The exports of a run: each a process of its own, which goes on when the page is closed."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from gradio_app.errors import Refused
from gradio_app.exporting import rules
from gradio_app.exporting.export import FACTS, FOLDER, LOG, OUTPUT, RESULT, Export, checked_name
from gradio_app.exporting.export import read as read_export
from gradio_app.exporting.sizes import base_of, base_size
from gradio_app.exporting.wishes import Wish, checkpoint_of, slug
from gradio_app.guards import inside
from gradio_app.running.environment import trainer_environment
from gradio_app.running.local import PROCESS, LocalExecutor
from gradio_app.running.reading import json_object
from gradio_app.running.store import Run, RunStore
from gradio_app.settings import Settings
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import write_json


class Exports:
    """Starts, watches and ends exports. What there is to know of them is in the run's folder.

    Args:
        settings: What the server was started with.
        store: All runs.
        busy: Returns the run that uses this machine, if one does.
    """

    def __init__(self, settings: Settings, store: RunStore, busy: Callable[[], Run | None]) -> None:
        self.settings, self.store, self._busy = settings, store, busy
        self._local = LocalExecutor(settings)
        # The server's own children must be waited for, or they stay as zombies.
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = threading.RLock()

    def list(self, run: Run) -> list[Export]:
        """Returns the exports of a run, the newest first."""
        with self._lock:
            self._children = [child for child in self._children if child.poll() is None]
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
            Refused: If there is none that ``owner`` can see.
        """
        run = self.store.get(owner, run_id)
        wanted = checked_name(name)
        found = next((export for export in self.list(run) if export.name == wanted), None)
        if found is None:
            raise Refused("exporting.refused_name", name=wanted)
        return run, found

    def start(self, owner: str, run_id: object, wish: Wish) -> Export:
        """Starts an export; one that is to be pushed lists first what would be.

        Args:
            owner: Whose run it is.
            run_id: Which run.
            wish: What is wanted.

        Raises:
            Refused: If it cannot be had now.
        """
        with self._lock:
            run = self.store.get(owner, run_id)
            self.check(run, wish)
            rules.check_count(self.list(run), self.settings)
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            name = f"{stamp}-{wish.format}-{secrets.token_hex(2)}"
            folder = inside(run.folder.path, f"{FOLDER}/{name}")
            folder.mkdir(parents=True)
            self._start(run, folder, wish, dry=True, token=None)
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
            Refused: If there is nothing to push, or nobody who does.
        """
        with self._lock:
            run, export = self.get(owner, run_id, name)
            if export.state != "asks":
                raise Refused("exporting.refused_nothing_listed")
            if self.settings.space and not token:
                raise Refused("exporting.refused_no_token")
            self.check(run, export.wish)
            shutil.rmtree(export.output, ignore_errors=True)
            self._start(run, export.folder, export.wish, dry=False, token=token)
            return self.get(owner, run_id, name)[1]

    def check(self, run: Run, wish: Wish) -> None:
        """Refuses what cannot be exported now.

        Raises:
            Refused: If it cannot, with the reason.
        """
        checkpoint = checkpoint_of(run, wish.checkpoint)
        if any(export.active for export in self.list(run)):
            raise Refused("exporting.refused_one")
        if not wish.heavy:
            return
        rules.check_machine(self._busy(), run.owner)
        size = base_size(checkpoint.folder, self.settings.data_root)
        rules.check_size(size, self.settings)
        runs = self.store.all() if self.settings.space else self.store.list(run.owner)
        if any(one.active and one.wish.heavy for other in runs for one in self.list(other)):
            raise Refused("exporting.refused_heavy")

    def cancel(self, owner: str, run_id: object, name: object) -> Export:
        """Ends an export; what it has written goes.

        Raises:
            Refused: If it is not going on.
        """
        with self._lock:
            run, export = self.get(owner, run_id, name)
            if not export.active:
                raise Refused("exporting.refused_over")
            facts = json_object(export.folder / FACTS)
            write_json(export.folder / FACTS, {**facts, "cancelled": time.time()})
            self._local.kill(replace(run, folder=RunFolder(export.folder)))
            return self.get(owner, run_id, name)[1]

    def delete(self, owner: str, run_id: object, name: object) -> None:
        """Deletes an export from this machine; what was pushed stays on the hub.

        Raises:
            Refused: If it is going on.
        """
        with self._lock:
            run, export = self.get(owner, run_id, name)
            if export.active:
                raise Refused("exporting.refused_going")
            shutil.rmtree(inside(run.folder.path / FOLDER, export.name))

    def _start(self, run: Run, folder: Path, wish: Wish, dry: bool, token: str | None) -> None:
        for left in (RESULT, PROCESS):
            (folder / left).unlink(missing_ok=True)
        adapter = f"{slug(run)}={checkpoint_of(run, wish.checkpoint).folder}"
        told = replace(wish, base_name=self._base_name(run, wish))
        words = [*self.settings.command, *told.words(adapter, folder / OUTPUT, dry)]
        facts = {"wish": asdict(wish), "run_name": slug(run), "created": time.time()}
        try:
            with (folder / LOG).open("wb") as log, (folder / RESULT).open("wb") as result:
                process = subprocess.Popen(
                    words,
                    # As for training: a base can be named from there.
                    cwd=self.settings.data_root or run.folder.path,
                    env=pusher_environment(self.settings, token),
                    stdin=subprocess.DEVNULL,
                    stdout=result,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise Refused("run.refused_start", why=error.strerror or type(error).__name__) from None
        self._children.append(process)
        with contextlib.suppress(psutil.NoSuchProcess):
            created = psutil.Process(process.pid).create_time()
            write_json(folder / PROCESS, {"pid": process.pid, "created": created})
        write_json(folder / FACTS, facts)

    def _base_name(self, run: Run, wish: Wish) -> str:
        """Returns what the files call the base: on a Space, never a folder of the server."""
        base, _ = base_of(checkpoint_of(run, wish.checkpoint).folder)
        if wish.base_name or not (self.settings.space and Path(base).is_absolute()):
            return wish.base_name
        return run.public.text(base)

    def _read(self, folder: Path) -> Export | None:
        working = self._local.working(RunFolder(folder))
        if not working and folder.is_dir():
            # What a process that was ended could not take away itself.
            for left in folder.glob(f".incomplete-*-{OUTPUT}"):
                shutil.rmtree(left, ignore_errors=True)
        return read_export(folder, working)


def pusher_environment(settings: Settings, token: str | None) -> dict[str, str]:
    """Returns the environment of a process that exports, with a token if it pushes.

    Args:
        settings: What the server was started with.
        token: Token of whoever pushes.
    """
    environment = trainer_environment(settings)
    if token:
        environment["HF_TOKEN"] = token
        # On a Space nobody is signed in by themselves; here somebody has just been named.
        environment.pop("HF_HUB_DISABLE_IMPLICIT_TOKEN", None)
    return environment
