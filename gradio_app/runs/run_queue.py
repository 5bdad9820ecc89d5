"""Run queue: order, limits per visitor, and start of the next run."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from gradio_app.errors import UserError
from gradio_app.runs.metadata import LOCAL
from gradio_app.runs.store import RunStore
from gradio_app.runs.types import Run
from gradio_app.settings import Settings
from gradio_app.uploads import drop_expired

_log = logging.getLogger(__name__)
# How often the queue checks whether the machine is free.
POLL_SECONDS = 0.5
# How often it looks for runs that are kept no longer.
SWEEP_SECONDS = 300.0
# A run that was stopped for taking too long has this long to save.
LAST_SECONDS = 60.0


class RunQueue:
    """Starts the runs that wait, one after the other, and stops those that take too long.

    The queue is on disk: another server continues it.
    """

    def __init__(self, settings: Settings, store: RunStore) -> None:
        self.settings, self.store = settings, store
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._changed = threading.Event()
        self._swept = 0.0
        self._thread = threading.Thread(target=self._work, name="run-queue", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread. Active runs continue; waiting ones wait for the next server."""
        self._closed.set()
        self._changed.set()
        self._thread.join(5)

    def add(self, run: Run, resume: bool = False) -> Run:
        """Puts a new or resting run at the end of the queue.

        Raises UserError if it is active or waits already, has no checkpoint to resume from, or its
        owner has as many runs as one may have.
        """
        with self._lock:
            run = self.store.get(run.owner, run.id)
            if run.active or run.waiting:
                raise UserError("run.refused_active", name=run.name)
            if resume and not run.can_resume:
                raise UserError("run.refused_resume", name=run.name)
            self._check_room(run.owner)
            waiting = [other.metadata.waiting or 0.0 for other in self.order()]
            run = self.store.update_metadata(
                run,
                waiting=max([time.time(), *(place + 1 for place in waiting)]),
                resume=resume,
                from_step=run.checkpoint_step if resume else 0,
                stop_asked=None,
                kill_asked=None,
                out_of_time=False,
            )
            self.store.executor(run).on_queued(run)
        self._changed.set()
        return run

    def _check_room(self, owner: str) -> None:
        most = self.settings.limits.waiting
        if most is None:
            return
        own = [run for run in self.store.list(owner) if run.active or run.waiting]
        if len(own) >= most:
            raise UserError("run.refused_waiting", most=most)

    def order(self) -> list[Run]:
        """Returns the runs that wait, of everyone, the next one first."""
        waiting = [run for run in self.store.all() if run.waiting]
        return sorted(waiting, key=lambda run: (run.metadata.waiting or 0.0, run.id))

    def place(self, run: Run) -> int | None:
        """Returns the place of a run in the queue, from 1; ``None`` if it does not wait."""
        ids = [other.id for other in self.order()]
        return ids.index(run.id) + 1 if run.id in ids else None

    def move(self, owner: str, run_id: str, by: int) -> None:
        """Moves a run among its owner's own in the queue by some places, forwards if negative.

        Other owners' runs keep their places.
        """
        with self._lock:
            run = self._waiting(owner, run_id)
            own = [other for other in self.order() if other.owner == owner]
            places = [other.metadata.waiting for other in own]
            ids = [other.id for other in own]
            before = ids.index(run.id)
            after = min(max(before + by, 0), len(own) - 1)
            own.insert(after, own.pop(before))
            for other, place in zip(own, places, strict=True):
                if other.metadata.waiting != place:
                    self.store.update_metadata(other, waiting=place)

    def cancel(self, owner: str, run_id: str) -> Run:
        """Takes a run out of the queue; its folder stays. Raises UserError if it does not wait."""
        with self._lock:
            return self.store.update_metadata(self._waiting(owner, run_id), waiting=None)

    def delete(self, owner: str, run_id: str) -> None:
        """Deletes a run as :meth:`RunStore.delete` does; a waiting one leaves the queue first."""
        # Not between the look at it and its start.
        with self._lock:
            if self.store.get(owner, run_id).waiting:
                self.cancel(owner, run_id)
            self.store.delete(owner, run_id)

    def _waiting(self, owner: str, run_id: str) -> Run:
        run = self.store.get(owner, run_id)
        if not run.waiting:
            raise UserError("run.refused_not_waiting", name=run.name)
        return run

    def active(self) -> Run | None:
        """Returns the run that uses this machine now, also one of the command line."""
        return next(iter(self._active()), None)

    def _active(self) -> list[Run]:
        return [
            run
            for run in self.store.all()
            if run.active and self.store.executor(run).uses_this_machine
        ]

    def stop(self, owner: str, run_id: str) -> Run:
        """Requests that a run finish its step, save and end; a waiting one leaves the queue."""
        # Not between its launch and its process, which would not hear of it.
        with self._lock:
            if self.store.get(owner, run_id).waiting:
                return self.cancel(owner, run_id)
            run = self._require_active(owner, run_id)
            self.store.executor(run).stop(run)
            return self.store.update_metadata(
                run, stop_asked=run.metadata.stop_asked or time.time()
            )

    def save(self, owner: str, run_id: str) -> Run:
        """Requests that an active run save after its step and continue."""
        run = self._require_active(owner, run_id)
        self.store.executor(run).save(run)
        return run

    def kill(self, owner: str, run_id: str) -> Run:
        """Ends an active run at once; what it has learnt since its last checkpoint is lost."""
        with self._lock:
            run = self._require_active(owner, run_id)
            self.store.executor(run).kill(run)
            return self.store.update_metadata(run, kill_asked=time.time())

    def _require_active(self, owner: str, run_id: str) -> Run:
        run = self.store.get(owner, run_id)
        if not run.active:
            raise UserError("run.refused_rests", name=run.name)
        return run

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                self.process_pending()
            except Exception:
                # The next round may do better; without the thread nothing would ever start.
                _log.exception("the run queue could not be processed")
            self._changed.wait(POLL_SECONDS)
            self._changed.clear()

    def process_pending(self) -> None:
        """Does what is due: starts, stops and deletes runs."""
        with self._lock:
            active = self._active()
            for run in active:
                self._watch_time(run)
            used = len(active)
            for run in self.order():
                here = self.store.executor(run).uses_this_machine
                if not here or used < self.settings.max_concurrent_runs:
                    self._start(run)
                    used += here
            if time.monotonic() - self._swept > SWEEP_SECONDS or not self._swept:
                self._swept = time.monotonic()
                self._sweep()

    def _start(self, run: Run) -> None:
        # First on disk: a server that is killed in between must not start it twice.
        run = self.store.update_metadata(run, waiting=None, launched=time.time())
        try:
            self.store.executor(run).start(run)
        except UserError as refusal:
            _log.warning("run %s was not started: %s", run.id, refusal)
            (run.folder.path / "start.log").write_text(f"{refusal}\n", encoding="utf-8")

    def _watch_time(self, run: Run) -> None:
        minutes = self.settings.limits.minutes
        begun = run.metadata.launched
        if minutes is None or begun is None:
            return
        late = time.time() - begun - minutes * 60
        if late > 0 and not run.metadata.out_of_time:
            run = self.store.update_metadata(run, out_of_time=True)
            self.stop(run.owner, run.id)
        elif late > LAST_SECONDS and not run.metadata.kill_asked:
            self.kill(run.owner, run.id)

    def _sweep(self) -> None:
        """Erases what was deleted an hour ago, and on a Space what visitors have left."""
        self.store.erase_deleted()
        hours = self.settings.limits.keep_hours
        if hours is None:
            return
        for run in self.store.all():
            last = max(run.created, run.status.updated)
            old = time.time() - last > hours * 3600
            if old and run.owner != LOCAL and not run.active and not run.waiting:
                # What is being exported or cannot be erased is deleted at a later round.
                with contextlib.suppress(UserError, OSError):
                    self.store.erase(run.owner, run.id)
        drop_expired(self.settings, self.store.recipes)
