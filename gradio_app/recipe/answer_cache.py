"""Answers that take long to find, kept for some minutes: the same question is answered once."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

SECONDS = 300.0
MAX_ANSWERS = 200
_POLL_SECONDS = 0.1
Answer = TypeVar("Answer")
StillNeeded = Callable[[], bool]


class AnswerCache:
    """Answers by question, for all open pages. Questions name all that their answers depend on."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, Any]] = {}
        # Questions that a page looks for the answer of.
        self._pending: set[str] = set()
        self._changed = threading.Condition()

    def ask(
        self,
        question: object,
        find: Callable[[StillNeeded], Answer],
        keep: Callable[[Answer], bool],
        still_needed: StillNeeded | None = None,
    ) -> Answer:
        """Returns the answer to a question.

        Args:
            question: What the answer belongs to: its ``repr``.
            find: Finds the answer, given ``still_needed``. It is called by one page at a time for
                each question; others wait, and take an answer that is kept.
            keep: Whether an answer is kept.
            still_needed: Polled; whether the caller still needs it, by default always. Where it
                does not, ``find`` returns a cancelled answer.
        """
        still_needed = still_needed or (lambda: True)
        key = hashlib.sha256(repr(question).encode()).hexdigest()
        while needed := still_needed():
            with self._changed:
                if key not in self._pending:
                    self._forget_old()
                    if key in self._answers:
                        known: Answer = self._answers[key][1]
                        return known
                    self._pending.add(key)
                    break
                self._changed.wait(_POLL_SECONDS)
        if not needed:
            return find(lambda: False)
        try:
            found = find(still_needed)
            if keep(found):
                with self._changed:
                    self._answers[key] = (time.monotonic(), found)
                    self._forget_old()
            return found
        finally:
            with self._changed:
                self._pending.remove(key)
                self._changed.notify_all()

    def _forget_old(self) -> None:
        now = time.monotonic()
        # In the order of their times.
        for key in [*self._answers]:
            if now - self._answers[key][0] < SECONDS and len(self._answers) <= MAX_ANSWERS:
                break
            del self._answers[key]


def file_stamps(place: Path) -> list[tuple[str, int, int]]:
    """Returns names, sizes and times of a file, or of the files of a folder; of none, nothing."""
    try:
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        return [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files]
    except (OSError, ValueError):
        return []
