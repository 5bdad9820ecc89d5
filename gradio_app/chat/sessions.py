"""Chat sessions: at most one loaded model per machine, used by one visitor at a time."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradio_app.chat.command import (
    ModelProcess,
    redact_message,
    start_chat_process,
    unsupported_task,
)
from gradio_app.chat.request import Sampling, Turns
from gradio_app.errors import UserError
from gradio_app.runs.types import Run
from gradio_app.settings import Settings
from lightning_peft.processes import ProcessExited

_log = logging.getLogger(__name__)
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Timeouts:
    """How long is waited for what, in seconds.

    For a model to be loaded; for the next word, after which the process counts as hung; for the
    next question, before the model is unloaded; and before another visitor of a Space may take the
    place.
    """

    loading: float = 1_800.0
    silence: float = 300.0
    idle: float = 600.0
    reservation: float = 60.0


@dataclass(frozen=True)
class ModelStatus:
    """State of a model process, for the visitor who uses it.

    ``phase`` is ``"none"``, ``"loading"``, ``"ready"`` or ``"answering"``. ``what`` is being loaded
    for so many ``seconds``. ``memory_bytes`` are on a GPU those of the weights, else all of its
    main memory. ``notes`` are what a user should know.
    """

    phase: str = "none"
    run_id: str = ""
    what: str = ""
    seconds: float = 0.0
    device: str = ""
    memory_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnswerChunk:
    """An answer as far as it is there: all of its text so far, and whether it is done.

    ``ended`` indicates whether the model ended it, ``stopped`` whether the visitor did; ``dropped``
    counts turns of the conversation that were left out, and ``seconds`` are those of a whole
    answer.
    """

    text: str
    done: bool = False
    tokens: int = 0
    ended: bool = False
    stopped: bool = False
    dropped: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second; 0 where that is not known."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class ScoreProgress:
    """How far rows are answered.

    ``answers`` of ``total`` are given, and ``rows`` are those that base and checkpoint have
    answered, as ``chat --serve`` writes them.
    """

    total: int
    answers: int = 0
    rows: tuple[Mapping[str, Any], ...] = ()
    done: bool = False
    stopped: bool = False


@dataclass
class _LoadedModel:
    """The model process, and whose it is."""

    process: ModelProcess
    names: dict[str, str]
    owner: str
    run_id: str
    used: float
    phase: str = "loading"
    what: str = ""
    seconds: float = 0.0
    ready: dict[str, Any] | None = None
    answering: int | None = None

    def serves(self, run: Run, *checkpoints: str | None) -> bool:
        same = self.run_id == run.id and {None, *self.names}.issuperset(checkpoints)
        return same and self.phase in ("ready", "answering") and self.process.alive


class ChatSessions:
    """Starts, queries and ends the model process.

    ``using`` returns the run that uses the machine, which is then not shared with a model.
    """

    def __init__(
        self, settings: Settings, using: Callable[[], Run | None], timeouts: Timeouts | None = None
    ) -> None:
        self.settings, self.timeouts = settings, timeouts or Timeouts()
        self._using = using
        self._lock = threading.RLock()
        self._loaded: _LoadedModel | None = None
        self._keys = itertools.count(1)
        self._closed = threading.Event()
        threading.Thread(target=self._watch_idle, name="chat-sessions", daemon=True).start()

    def close(self) -> None:
        """Ends the process."""
        self._closed.set()
        with self._lock:
            self._unload(self._loaded)

    @property
    def process_id(self) -> int | None:
        """Number of the model process, while there is one, whoever's it is."""
        loaded = self._loaded
        return loaded.process.pid if loaded is not None else None

    def model_status(self, owner: str) -> ModelStatus:
        """Returns the state of a visitor's model; that of another visitor's is not revealed."""
        loaded = self._loaded
        if loaded is None or loaded.owner != owner:
            return ModelStatus()
        ready = loaded.ready or {}
        device = str(ready.get("device", ""))
        memory = loaded.process.resident_bytes
        if device not in ("", "cpu"):
            memory = int(ready.get("memory_bytes", 0))
        return ModelStatus(
            phase=loaded.phase,
            run_id=loaded.run_id,
            what=loaded.what,
            seconds=loaded.seconds,
            device=device,
            memory_bytes=memory,
            notes=tuple(redact_message(note, self.settings) for note in ready.get("notes", ())),
        )

    def reason(self, owner: str) -> UserError | None:
        """Returns why a visitor cannot talk to a model now, ``None`` if they can."""
        run = self._using()
        if run is not None:
            if run.owner == owner:
                return UserError("playground.refused_active", name=run.name)
            return UserError("playground.refused_active_other")
        loaded = self._loaded
        if loaded is None or loaded.owner == owner:
            return None
        rested = time.monotonic() - loaded.used > self.timeouts.reservation
        free = loaded.phase == "ready" and rested
        return None if free else UserError("playground.refused_other")

    def load(self, owner: str, run: Run, *checkpoints: str) -> Iterator[ModelStatus]:
        """Loads a run's base and checkpoints, unless they are; yields how far it is.

        Raises UserError if a run uses the machine, or another visitor the model; if there is no
        such checkpoint, or two cannot share a base; if it cannot be loaded, and why; if what the
        run trains cannot talk.
        """
        if unsupported_task(run):
            raise UserError("playground.refused_silent", name=run.name)
        with self._lock:
            self._check(owner)
            loaded = self._loaded
            if loaded is not None and loaded.owner == owner and loaded.serves(run, *checkpoints):
                return
            self._unload(loaded)
            process, names = start_chat_process(self.settings, run, *checkpoints)
            loaded = _LoadedModel(process, names, owner, run.id, time.monotonic())
            self._loaded = loaded
        try:
            yield from self._loading(loaded)
        finally:
            # Also where the generator is closed early.
            if loaded.phase == "loading":
                self._unload(loaded)

    def _loading(self, loaded: _LoadedModel) -> Iterator[ModelStatus]:
        end = time.monotonic() + self.timeouts.loading
        yield self.model_status(loaded.owner)
        while loaded.ready is None:
            row = self._next(loaded, min(self.timeouts.silence, max(end - time.monotonic(), 0.0)))
            progress = row.get("progress")
            if isinstance(progress, dict):
                loaded.what = str(progress.get("what", ""))
                loaded.seconds = float(progress.get("seconds", 0.0))
            elif isinstance(row.get("ready"), dict):
                loaded.ready, loaded.phase, loaded.used = row["ready"], "ready", time.monotonic()
            elif "error" in row:
                why = redact_message(row["error"], self.settings)
                raise UserError("playground.refused_load", why=why)
            yield self.model_status(loaded.owner)

    def answer(
        self, owner: str, run: Run, checkpoint: str | None, messages: Turns, sampling: Sampling
    ) -> Iterator[AnswerChunk]:
        """Yields an answer as it comes.

        ``checkpoint`` is ``None`` for the base. Raises UserError if the model is not loaded any
        more, may not be used now, or cannot answer.
        """
        request = {"messages": list(messages), **sampling.as_dict()}
        text, begun = "", time.monotonic()
        for row, pending in self._replies(owner, run, checkpoint, "adapter", request):
            if row.get("done"):
                names = ("tokens", "ended", "stopped", "dropped")
                facts = {name: row.get(name, 0) for name in names}
                yield AnswerChunk(
                    text.strip(), done=True, seconds=time.monotonic() - begun, **facts
                )
                return
            text += str(row.get("text", ""))
            # Who reads slower than the model writes gets more at a time, and can still stop it.
            if not pending:
                yield AnswerChunk(text)

    def score(
        self,
        owner: str,
        run: Run,
        checkpoint: str,
        rows: Sequence[Mapping[str, Any]],
        sampling: Sampling,
    ) -> Iterator[ScoreProgress]:
        """Yields how far the base and a checkpoint have answered rows, and the answers so far.

        ``rows`` have ``messages`` and ``reference``. Raises UserError as :meth:`answer` does.
        """
        request = {"rows": list(rows), **sampling.as_dict()}
        now = ScoreProgress(total=2 * len(rows))
        yield now
        for row, pending in self._replies(owner, run, checkpoint, "adapters", request):
            answered, progress = row.get("row"), row.get("progress")
            if isinstance(answered, dict):
                now = replace(now, rows=(*now.rows, answered))
            elif isinstance(progress, dict):
                now = replace(now, answers=int(progress.get("done", 0)))
            elif row.get("done"):
                now = replace(now, done=True, stopped=bool(row.get("stopped")))
            if now.done or not pending:
                yield now

    def _replies(
        self, owner: str, run: Run, checkpoint: str | None, key_of_names: str, fields: Any
    ) -> Iterator[tuple[dict[str, Any], bool]]:
        """Yields the lines that answer a request, and whether the next one is there already.

        The request is for one name (``"adapter"``), or for the base too (``"adapters"``).
        """
        loaded, key = self._reserve(owner, run, checkpoint)
        whole = False
        try:
            name = "base" if checkpoint is None else loaded.names[checkpoint]
            names = name if key_of_names == "adapter" else ["base", name]
            try:
                loaded.process.send({"id": key, key_of_names: names, **fields})
            except ProcessExited:
                raise self._end_of(loaded) from None
            while not whole:
                row = self._next(loaded, self.timeouts.silence)
                # Others are the rest of an answer that was abandoned.
                if row.get("id") == key:
                    whole = "error" in row or bool(row.get("done"))
                    if "error" in row:
                        why = redact_message(row["error"], self.settings)
                        raise UserError("playground.refused_answer", why=why)
                    yield row, loaded.process.has_pending
        except UserError:
            whole = True
            raise
        finally:
            if not whole:
                # The rest is not needed.
                with contextlib.suppress(ProcessExited):
                    loaded.process.send({"stop": key})
            with self._lock:
                loaded.phase, loaded.answering, loaded.used = "ready", None, time.monotonic()

    def _reserve(self, owner: str, run: Run, checkpoint: str | None) -> tuple[_LoadedModel, int]:
        with self._lock:
            self._check(owner)
            loaded = self._loaded
            if loaded is None or loaded.owner != owner or not loaded.serves(run, checkpoint):
                raise UserError("playground.was_unloaded")
            loaded.phase, loaded.answering = "answering", next(self._keys)
            return loaded, loaded.answering

    def prompt_affixes(self, owner: str) -> list[str] | None:
        """Returns the template's text before and after a first question."""
        loaded = self._loaded
        ready = loaded.ready if loaded is not None and loaded.owner == owner else None
        found = (ready or {}).get("prompt_affixes")
        return found if isinstance(found, list) and len(found) == 2 else None

    def stop(self, owner: str) -> None:
        """Ends the answer that a visitor is being given, if there is one."""
        loaded = self._loaded
        if loaded is not None and loaded.owner == owner and loaded.answering is not None:
            with contextlib.suppress(ProcessExited):
                loaded.process.send({"stop": loaded.answering})

    def unload(self, owner: str) -> None:
        """Ends a visitor's model process, also while it loads or answers."""
        with self._lock:
            if self._loaded is not None and self._loaded.owner == owner:
                self._unload(self._loaded)

    def _check(self, owner: str) -> None:
        if self._closed.is_set():
            raise UserError("playground.was_unloaded")
        reason = self.reason(owner)
        if reason is not None:
            raise reason
        if self._loaded is not None and self._loaded.phase in ("loading", "answering"):
            raise UserError(f"playground.refused_{self._loaded.phase}")

    def _next(self, loaded: _LoadedModel, seconds: float) -> dict[str, Any]:
        try:
            return loaded.process.receive(seconds)
        except ProcessExited:
            raise self._end_of(loaded) from None
        except TimeoutError:
            self._unload(loaded)
            raise UserError("playground.hung", seconds=round(seconds)) from None

    def _end_of(self, loaded: _LoadedModel) -> UserError:
        ended_on_purpose = self._loaded is not loaded
        why = redact_message(loaded.process.last_output().rpartition("\n")[2], self.settings)
        self._unload(loaded)
        if ended_on_purpose:
            return UserError("playground.was_unloaded")
        return UserError("playground.died_saying", why=why) if why else UserError("playground.died")

    def _unload(self, loaded: _LoadedModel | None) -> None:
        with self._lock:
            if loaded is not None and self._loaded is loaded:
                self._loaded = None
        if loaded is not None:
            loaded.process.kill()

    def _watch_idle(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            try:
                self.check_idle()
            except Exception:
                _log.exception("the model process could not be looked after")

    def check_idle(self) -> None:
        """Ends the process where it is not used, is gone, or a run needs the machine."""
        with self._lock:
            loaded = self._loaded
            if loaded is None or loaded.phase != "ready":
                return
            idle = time.monotonic() - loaded.used > self.timeouts.idle
            if idle or not loaded.process.alive or self._using() is not None:
                self._unload(loaded)
