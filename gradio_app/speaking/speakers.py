"""The model that is talked to: at most one on the machine, for one visitor at a time."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gradio_app.errors import Refused
from gradio_app.running.store import Run
from gradio_app.settings import Settings
from gradio_app.speaking.asking import Sampling, Turns
from gradio_app.speaking.command import chat_process, said
from gradio_app.speaking.process import Gone, ModelProcess
from gradio_app.speaking.talkable import silent

_log = logging.getLogger(__name__)
TEND_SECONDS = 1.0


@dataclass(frozen=True)
class Patience:
    """How long is waited for what, in seconds.

    Attributes:
        loading: For a model to be loaded.
        silence: For the next word, after which the process counts as hung.
        idle: For the next question, before the model is unloaded.
        seat: For the next question, before another visitor of a Space may take the place.
    """

    loading: float = 1_800.0
    silence: float = 300.0
    idle: float = 600.0
    seat: float = 60.0


@dataclass(frozen=True)
class Standing:
    """What of a model process is told to whoever uses it.

    Attributes:
        phase: ``"none"``, ``"loading"``, ``"ready"`` or ``"answering"``.
        run_id: The run whose adapters it has.
        what: What is being loaded, in the words of the command line.
        seconds: For how long.
        device: ``"cpu"`` or ``"cuda"``.
        memory_bytes: What it takes: of the GPU its weights, else all of its main memory.
        notes: What a user should know.
    """

    phase: str = "none"
    run_id: str = ""
    what: str = ""
    seconds: float = 0.0
    device: str = ""
    memory_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """An answer as far as it is there.

    Attributes:
        text: All of it so far.
        done: Whether it is whole.
        tokens: How many tokens it has.
        ended: Whether the model ended it itself.
        stopped: Whether the visitor did.
        dropped: Turns of the conversation that were left out.
        seconds: How long it took, once it is whole.
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


@dataclass
class _Held:
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

    def serves(self, run: Run, checkpoint: str) -> bool:
        same = self.run_id == run.id and checkpoint in self.names
        return same and self.phase in ("ready", "answering") and self.process.alive


class Speakers:
    """Starts, asks and ends the model process.

    Args:
        settings: What the server was started with.
        using: Returns the run that uses the machine, which is then not shared with a model.
        patience: How long is waited for what.
    """

    def __init__(
        self,
        settings: Settings,
        using: Callable[[], Run | None],
        patience: Patience | None = None,
    ) -> None:
        self.settings, self.patience = settings, patience or Patience()
        self._using = using
        self._lock = threading.RLock()
        self._held: _Held | None = None
        self._keys = itertools.count(1)
        self._closed = threading.Event()
        threading.Thread(target=self._tend, name="speakers", daemon=True).start()

    def close(self) -> None:
        """Ends the process."""
        self._closed.set()
        with self._lock:
            self._drop(self._held)

    def standing(self, owner: str) -> Standing:
        """Returns how a visitor's model is; of another's, nothing is told."""
        held = self._held
        if held is None or held.owner != owner:
            return Standing()
        ready = held.ready or {}
        device = str(ready.get("device", ""))
        memory = held.process.resident_bytes
        if device not in ("", "cpu"):
            memory = int(ready.get("memory_bytes", 0))
        return Standing(
            phase=held.phase,
            run_id=held.run_id,
            what=held.what,
            seconds=held.seconds,
            device=device,
            memory_bytes=memory,
            notes=tuple(said(note, self.settings) for note in ready.get("notes", ())),
        )

    def reason(self, owner: str) -> Refused | None:
        """Returns why a visitor cannot talk to a model now, ``None`` if they can."""
        run = self._using()
        if run is not None:
            if run.owner == owner:
                return Refused("trying.refused_active", name=run.name)
            return Refused("trying.refused_active_other")
        held = self._held
        if held is None or held.owner == owner:
            return None
        rested = time.monotonic() - held.used > self.patience.seat
        free = held.phase == "ready" and rested
        return None if free else Refused("trying.refused_other")

    def load(self, owner: str, run: Run, checkpoint: str) -> Iterator[Standing]:
        """Loads a run's base and adapters, unless they are; yields how far it is.

        Args:
            owner: Who asks; the run is theirs.
            run: The run.
            checkpoint: Name of the checkpoint that must be among the adapters.

        Raises:
            Refused: If a run uses the machine, or another visitor the model; if there is no such
                checkpoint; if it cannot be loaded, and why; if what the run trains cannot talk.
        """
        if silent(run):
            raise Refused("trying.refused_silent", name=run.name)
        with self._lock:
            self._check(owner)
            held = self._held
            if held is not None and held.owner == owner and held.serves(run, checkpoint):
                return
            self._drop(held)
            process, names = chat_process(self.settings, run, checkpoint)
            held = _Held(process, names, owner, run.id, time.monotonic())
            self._held = held
        try:
            yield from self._loading(held)
        finally:
            # Also where nobody waits for it any more.
            if held.phase == "loading":
                self._drop(held)

    def _loading(self, held: _Held) -> Iterator[Standing]:
        end = time.monotonic() + self.patience.loading
        yield self.standing(held.owner)
        while held.ready is None:
            row = self._next(held, min(self.patience.silence, max(end - time.monotonic(), 0.0)))
            progress = row.get("progress")
            if isinstance(progress, dict):
                held.what = str(progress.get("what", ""))
                held.seconds = float(progress.get("seconds", 0.0))
            elif isinstance(row.get("ready"), dict):
                held.ready, held.phase, held.used = row["ready"], "ready", time.monotonic()
            elif "error" in row:
                raise Refused("trying.refused_load", why=said(row["error"], self.settings))
            yield self.standing(held.owner)

    def answer(
        self, owner: str, run: Run, checkpoint: str | None, messages: Turns, sampling: Sampling
    ) -> Iterator[Piece]:
        """Yields an answer as it comes.

        Args:
            owner: Who asks.
            run: The run whose model is loaded.
            checkpoint: Which adapters answer; ``None`` for the base.
            messages: The conversation, the question last.
            sampling: How tokens are drawn.

        Raises:
            Refused: If the model is not loaded any more, may not be used now, or cannot answer.
        """
        held, key = self._seated(owner, run, checkpoint)
        whole = False
        try:
            name = "base" if checkpoint is None else held.names[checkpoint]
            asked = {"id": key, "adapter": name, "messages": list(messages), **sampling.as_dict()}
            self._send(held, asked)
            for piece in self._pieces(held, key):
                whole = piece.done
                yield piece
        except Refused:
            whole = True
            raise
        finally:
            if not whole:
                # Nobody waits for the rest.
                with contextlib.suppress(Gone):
                    held.process.send({"stop": key})
            with self._lock:
                held.phase, held.answering, held.used = "ready", None, time.monotonic()

    def _seated(self, owner: str, run: Run, checkpoint: str | None) -> tuple[_Held, int]:
        with self._lock:
            self._check(owner)
            held = self._held
            if (
                held is None
                or held.owner != owner
                or not held.serves(run, checkpoint or _any(held))
            ):
                raise Refused("trying.was_unloaded")
            held.phase, held.answering = "answering", next(self._keys)
            return held, held.answering

    def _pieces(self, held: _Held, key: int) -> Iterator[Piece]:
        text, begun = "", time.monotonic()
        while True:
            row = self._next(held, self.patience.silence)
            if row.get("id") != key:
                # The rest of an answer that nobody waited for.
                continue
            if "error" in row:
                raise Refused("trying.refused_answer", why=said(row["error"], self.settings))
            if not row.get("done"):
                text += str(row.get("text", ""))
                # Who reads slower than the model writes gets more at a time, and can still stop it.
                if not held.process.waiting:
                    yield Piece(text)
                continue
            facts = {name: row.get(name, 0) for name in ("tokens", "ended", "stopped", "dropped")}
            yield Piece(text.strip(), done=True, seconds=time.monotonic() - begun, **facts)
            return

    def around_question(self, owner: str) -> list[str] | None:
        """Returns what the template puts before and after a first question."""
        held = self._held
        ready = held.ready if held is not None and held.owner == owner else None
        found = (ready or {}).get("around_question")
        return found if isinstance(found, list) and len(found) == 2 else None

    def stop(self, owner: str) -> None:
        """Ends the answer that a visitor is being given, if there is one."""
        held = self._held
        if held is not None and held.owner == owner and held.answering is not None:
            with contextlib.suppress(Gone):
                held.process.send({"stop": held.answering})

    def unload(self, owner: str) -> None:
        """Ends a visitor's model process, also while it loads or answers."""
        with self._lock:
            if self._held is not None and self._held.owner == owner:
                self._drop(self._held)

    def _check(self, owner: str) -> None:
        if self._closed.is_set():
            raise Refused("trying.was_unloaded")
        reason = self.reason(owner)
        if reason is not None:
            raise reason
        if self._held is not None and self._held.phase in ("loading", "answering"):
            raise Refused(f"trying.refused_{self._held.phase}")

    def _send(self, held: _Held, row: dict[str, Any]) -> None:
        try:
            held.process.send(row)
        except Gone:
            raise self._end_of(held) from None

    def _next(self, held: _Held, seconds: float) -> dict[str, Any]:
        try:
            return held.process.next(seconds)
        except Gone:
            raise self._end_of(held) from None
        except TimeoutError:
            self._drop(held)
            raise Refused("trying.hung", seconds=round(seconds)) from None

    def _end_of(self, held: _Held) -> Refused:
        asked_for = self._held is not held
        why = said(held.process.said_last().rpartition("\n")[2], self.settings)
        self._drop(held)
        if asked_for:
            return Refused("trying.was_unloaded")
        return Refused("trying.died_saying", why=why) if why else Refused("trying.died")

    def _drop(self, held: _Held | None) -> None:
        with self._lock:
            if held is not None and self._held is held:
                self._held = None
        if held is not None:
            held.process.kill()

    def _tend(self) -> None:
        while not self._closed.wait(TEND_SECONDS):
            try:
                self.tend()
            except Exception:
                _log.exception("the model process could not be looked after")

    def tend(self) -> None:
        """Ends the process where it is not used, is gone, or a run wants the machine."""
        with self._lock:
            held = self._held
            if held is None or held.phase != "ready":
                return
            idle = time.monotonic() - held.used > self.patience.idle
            if idle or not held.process.alive or self._using() is not None:
                self._drop(held)


def _any(held: _Held) -> str:
    return next(iter(held.names))
