"""``async_save=True``: checkpoints written by a background thread.

What a checkpoint holds is taken at once; only the disk is left to the thread, which does one thing
after the other. So a checkpoint that another one replaces is removed when that one is whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from lightning_peft.compat.lightning import uploads_each
from lightning_peft.errors import ConfigError, itemize

log = logging.getLogger(__name__)


class BackgroundSaves:
    """What is being written, in order; written at once where ``enabled`` is false."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._failed = False
        self._looking: list[Any] = []

    def run(self, work: Callable[[], None]) -> None:
        """Does ``work`` after what came before it, unless that failed."""
        if not self.enabled:
            work()
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending.append(self._thread.submit(self._try, work))

    def _try(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise

    def wait(self) -> None:
        """Returns when all is written; raises what kept it from being written."""
        pending, self._pending = self._pending, []
        wait(pending)
        self._failed = False
        for one in pending:
            one.result()

    def come_before_looking(self, callbacks: list[Any]) -> None:
        """Lets callbacks look for names that are free when all is written, until :meth:`close`."""
        self._looking = [one for one in callbacks if hasattr(one, "file_exists")]
        for one in self._looking:
            one.__dict__["file_exists"] = partial(self._after_wait, one.file_exists)

    def _after_wait(self, look: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
        self.wait()
        return look(*args, **kwargs)

    def wait_after(self, error: BaseException) -> None:
        """Waits as well, where a run ends by ``error``: another one is logged."""
        try:
            self.wait()
        except Exception as problem:
            log.error("%s This was found after %s.", problem, type(error).__name__)

    def close(self) -> None:
        """Waits, ends the thread and gives callbacks their own methods back."""
        for one in self._looking:
            one.__dict__.pop("file_exists", None)
        self._looking = []
        try:
            self.wait()
        finally:
            thread, self._thread = self._thread, None
            if thread is not None:
                thread.shutdown()


def check_background_saves(trainer: Any, has_own_io: bool) -> None:
    """Looks for what does not go together with files that appear later."""
    problems = []
    if has_own_io:
        problems.append(
            "a CheckpointIO of your own, which decides itself when it writes. Wrap it in "
            "Lightning's AsyncCheckpointIO in place of async_save"
        )
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "save_last", None) == "link":
            problems.append(
                f"{type(callback).__name__}(save_last='link'): there would be nothing to link to "
                "yet. Use save_last=True"
            )
    problems += [
        f"{type(logger).__name__}, which reads each checkpoint as soon as it is saved. Use "
        "log_model=True without save_top_k=-1, which reads them at the end"
        for logger in trainer.loggers
        if any(uploads_each(logger, callback) for callback in trainer.checkpoint_callbacks)
    ]
    if problems:
        raise ConfigError("async_save=True cannot be used with:" + itemize(problems))
