"""Answers that take long to find, kept for some minutes: the same question is answered once."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

# What is free of this machine changes, and so do files.
SECONDS = 300.0
Answer = TypeVar("Answer")
StillNeeded = Callable[[], bool]


class AnswerCache:
    """Answers by question, for all open pages. Questions name all that their answers depend on."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, tuple[float, Any]] = {}

    def ask(
        self,
        question: Hashable,
        find: Callable[[StillNeeded], Answer],
        keep: Callable[[Answer], bool],
        still_needed: StillNeeded | None = None,
    ) -> Answer:
        """Returns the answer to a question.

        Args:
            question: What the answer belongs to.
            find: Finds the answer, unless a page that has asked the same finds it first; it is
                given what indicates whether the answer is still needed.
            keep: Whether an answer is kept.
            still_needed: Whether the caller still needs it; by default always.
        """
        now = time.monotonic()
        # Pages ask at the same time.
        for old in [k for k, one in [*self._answers.items()] if now - one[0] >= SECONDS]:
            self._answers.pop(old, None)

        def needed() -> bool:
            return question not in self._answers and (still_needed is None or still_needed())

        known = self._answers.get(question)
        if known is None:
            found = find(needed)
            if keep(found):
                known = self._answers[question] = (time.monotonic(), found)
            elif (known := self._answers.get(question)) is None:
                return found
        answer: Answer = known[1]
        return answer
