"""Errors in one process, and processes that wait for each other, made known to all of them.

A collective operation waits for every process, whatever has become of it. What is exchanged here
goes through the store of the process group, which answers whether others have come or not.
"""

from __future__ import annotations

import logging
import os
from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

from lightning_peft.compat.torch_distributed import group_store
from lightning_peft.errors import LifecycleError
from lightning_peft.plugin.launch import ended_process

if TYPE_CHECKING:
    from pytorch_lightning.strategies import DDPStrategy as _Base
else:
    # As Lightning's Strategy is: an object can only be given a class of the same layout.
    _Base = ABC

log = logging.getLogger(__name__)

_RUNS = count()
# Seconds: between two looks at the store, for a process to end by its own error, for the first
# process to keep the store, and for all to come before the collective operation is left to wait.
_LOOK, _OWN_ERROR, _KEEP_STORE, _MEET = 0.25, 30.0, 3.0, 60.0
# Seconds after which an exchange is known to others, and batches whose exchanges are remembered.
_LONG, _REMEMBERED = 3.0, 16


class FailureNoticeStrategy(_Base):
    """Waits for the other processes where each of them knows who is missing."""

    lifecycle: Any

    def setup_environment(self) -> None:
        """Lets processes know of each other's errors from here on."""
        super().setup_environment()
        self.lifecycle.failures.start(self.global_rank, self.world_size)

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Waits for all processes; where one cannot come, all end with an error."""
        self.lifecycle.failures.monitored_barrier(name or "barrier")
        super().barrier(name, *args, **kwargs)

    def reduce(self, tensor: Any, group: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Reduces; where one process has gone on without, all end with an error."""
        # Not all are in a group of the user's.
        alone = nullcontext() if group else self.lifecycle.failures.exchange("reduce")
        with alone:
            return super().reduce(tensor, group, *args, **kwargs)


class FailureNotice:
    """What the processes of a run know of each other outside of collective operations.

    Attributes:
        waits_alone: Returns why this process waits for what cannot come, or ``None``; asked when
            another process is out of memory.
    """

    def __init__(self) -> None:
        self.waits_alone: Callable[[], str | None] | None = None
        self._store: Any = None
        self._rank, self._world = 0, 1
        self._batches = 0
        self._meetings: dict[str, int] = {}
        # By batch, and by backward passes in it, of the last batches; and the one that this
        # process is in, with its start.
        self._backwards = 0
        self._exchanges: dict[tuple[int, int], int] = {}
        self._inside: tuple[str, float] | None = None
        self._failure: str | None = None
        self._stopped = Event()

    def __reduce__(self) -> tuple[type[FailureNotice], tuple[()]]:
        # A copy belongs to another run.
        return type(self), ()

    def start(self, rank: int, world: int) -> None:
        """Called when the process group is there, by all processes alike."""
        self.stop()
        store = None if world == 1 else group_store(f"lightning_peft/{next(_RUNS)}")
        # Processes that a launcher of Lightning has yet to start have no group.
        if store is None:
            return
        self._rank, self._world, self._store = rank, world, store
        self._batches, self._meetings, self._failure = 0, {}, None
        self._exchanges, self._inside, self.waits_alone = {}, None, None
        self._stopped = Event()
        Thread(target=self._watch, args=(self._stopped,), daemon=True).start()

    def stop(self) -> None:
        """Called when the run is over in this process."""
        self._stopped.set()
        self._store = self.waits_alone = None

    def begin_batch(self, number: int = 1) -> None:
        """Called before each training batch; with -1 where there was none."""
        self._batches += number
        self._backwards = 0
        for old in [one for one in self._exchanges if one[0] <= self._batches - _REMEMBERED]:
            del self._exchanges[old]

    def begin_backward(self) -> None:
        """Called before each backward pass, in which processes wait for each other."""
        self._backwards += 1

    @contextmanager
    def exchange(self, name: str) -> Iterator[None]:
        """Within the body, this process is in a collective operation that it may be in alone.

        It costs nothing between processes, as a barrier would: others know of it after some
        seconds.
        """
        here = (self._batches, self._backwards)
        self._exchanges[here] = number = self._exchanges.get(here, 0) + 1
        place = "/".join(map(str, (*here, name, number)))
        before, self._inside = self._inside, (place, monotonic())
        try:
            yield
        finally:
            self._inside = before

    def send(self, error: BaseException) -> None:
        """Lets the other processes know of an error that ends this one.

        Where another one has failed before, ``error`` is what this one noticed of it, and gets the
        reason.
        """
        store = self._store
        if store is None:
            return
        try:
            reason = self._known()
            if reason is not None and ended_process(error) and reason not in str(error):
                error.args = (f"{reason} Noticed here by: {error}",)
            elif reason is None:
                first = (str(error).strip().splitlines() or [""])[0][:500].rstrip(".")
                self._report(f"Process {self._rank} has ended by {type(error).__name__}: {first}.")
            end = monotonic() + _KEEP_STORE
            # The first process has the store.
            while self._rank == 0 and monotonic() < end:
                if store.add("seen", 0) >= self._world - 1 or self._stopped.wait(_LOOK):
                    break
        except RuntimeError:
            pass  # The store is gone with the process that had it.

    def report_shortage(self) -> None:
        """Lets the others know that this process is out of memory in its batch, until they do."""
        if self._store is not None:
            self._store.set("short", str(self._batches))

    def end_shortage(self) -> None:
        """Called when all have left the batch."""
        if self._store is not None:
            self._store.set("short", "")

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Returns when ``done`` is true.

        Raises:
            LifecycleError: If another process has ended, or waits for this one elsewhere.
        """
        while self._store is not None and not done():
            self._raise_known()
            self._stopped.wait(0.01)

    def _raise_known(self) -> None:
        if self._known() is not None:
            raise LifecycleError(f"{self._failure} Process {self._rank} ends too.")

    def monitored_barrier(self, name: str) -> None:
        """Waits until all processes are here, in the same batch.

        Raises:
            LifecycleError: If one is elsewhere, or has ended.
        """
        store = self._store
        if store is None:
            return
        place = f"{self._batches}/{name.replace('/', ' ')}"
        self._meetings[place] = number = self._meetings.get(place, 0) + 1
        place = f"{place}/{number}"
        try:
            # What is open is written before anyone is counted, so it is never of the past.
            store.set("open", f"{self._rank}/{place}")
            store.add(place, 1)
            end, pause = monotonic() + _MEET, 0.001
            while store.add(place, 0) < self._world and monotonic() < end:
                self._find_mismatch(store, place)
                self._raise_known()
                self._stopped.wait(pause)
                pause = min(2 * pause, 0.05)
        except LifecycleError:
            raise
        except RuntimeError:
            pass  # The store is gone; what comes next finds out why.

    def _report(self, reason: str) -> None:
        self._failure = self._store.compare_set("failure", "", reason).decode()

    def _known(self) -> str | None:
        if self._failure is None and self._store.check(["failure"]):
            self._failure = self._store.get("failure").decode()
        return self._failure

    def _find_mismatch(self, store: Any, here: str | None = None) -> None:
        """Reports where one waits for a process that has gone on, or waits elsewhere."""
        mine = self._batches
        if self._inside is not None and monotonic() - self._inside[1] > _LONG:
            store.set("inside", f"{self._rank}/{self._inside[0]}")
        if store.check(["inside"]):
            rank, batches, backwards, name, number = store.get("inside").decode().split("/")
            there, now = (int(batches), int(backwards)), (mine, self._backwards)
            known = mine - there[0] < _REMEMBERED
            if there < now and known and self._exchanges.get(there, 0) < int(number):
                passes = f"and {now[1]} backward passes of it"
                self._report_mismatch(rank, batches, name, f"has begun batch {mine} {passes}")
        if not store.check(["open"]):
            return
        rank, batches, name, number = store.get("open").decode().split("/")
        place = f"{batches}/{name}/{number}"
        if place == here or store.add(place, 0) >= self._world:
            return
        if mine > int(batches):
            self._report_mismatch(rank, batches, name, f"has begun batch {mine} of the fit")
        elif here and here.split("/")[0] == batches and store.add(here, 0) < self._world:
            self._report_mismatch(rank, batches, name, f"waits in {here.split('/')[1]!r} there")

    def _report_mismatch(self, rank: str, batches: str, name: str, doing: str) -> None:
        self._report(
            f"Process {rank} waits for all processes in {name!r} at batch {batches} of the "
            f"fit, and process {self._rank} {doing}. They would wait for ever. All have to train "
            "on equally many batches, and to stop, log, save and wait together: an iterable "
            "dataset or a sampler of your own gives each process as many batches; "
            "`trainer.should_stop` is set, and `log(sync_dist=True)`, `save_checkpoint` or "
            "`strategy.barrier` called, in all processes and not under `if rank == 0`."
        )

    def _is_short(self, store: Any) -> bool:
        """Whether a process is out of memory in the batch that this one is in."""
        return bool(store.check(["short"])) and store.get("short") == str(self._batches).encode()

    def _watch(self, stopped: Event) -> None:
        store, seen = self._store, None
        try:
            while not stopped.wait(_LOOK):
                self._find_mismatch(store)
                if self.waits_alone is not None and self._is_short(store):
                    reason = self.waits_alone()
                    if reason is not None:
                        self._report(reason)
                if self._known() is None:
                    continue
                if seen is None:
                    seen = monotonic()
                    store.add("seen", 1)
                elif monotonic() - seen > _OWN_ERROR + 3 * (self._rank > 0):
                    log.error("%s Process %d ends too.", self._failure, self._rank)
                    # The main thread waits where no error can be raised.
                    os._exit(1)
        except (RuntimeError, AttributeError):
            pass  # The store is gone, or the run is over.
