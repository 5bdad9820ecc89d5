"""Throughput and remaining time of a run."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from torch import Tensor

# Steps that the pace is averaged over: a validation in between shows, and passes.
WINDOW = 50
# Seconds between two lines: a hundredth of the time so far, between these.


class Throughput:
    """Steps, rows and tokens per second over the last steps since the start.

    Validations are timed apart: they are not part of a step, and come more or less often.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int, int, int | Tensor]] = deque(maxlen=WINDOW + 1)
        self.rows = 0
        # On the device that counts them: reading it in each step would wait for a GPU.
        self._tokens: int | Tensor = 0
        self._at_step: tuple[int, int | Tensor] = 0, 0
        self._validating_since: float | None = None
        # Seconds of all validations so far, with the samples and checkpoints that belong to them.
        self.validated = 0.0
        # The last one that looked at all rows, with the samples that belong to it.
        self._validation: float | None = None

    def add(self, batch: Any) -> None:
        """Counts the rows of a batch, and its tokens where it has an attention mask."""
        rows, tokens = rows_and_tokens(batch)
        self.rows += rows
        self._tokens = self._tokens + tokens

    @property
    def tokens(self) -> int:
        """Tokens since the start."""
        return int(self._tokens)

    @tokens.setter
    def tokens(self, tokens: int) -> None:
        self._tokens = tokens

    def step(self, number: int) -> None:
        """Marks that optimizer step ``number`` is done."""
        self._at_step = self.rows, self._tokens
        self._marks.append((self._training_time(), number, *self._at_step))

    def take_back(self) -> None:
        """Forgets the batches since the last optimizer step, which are trained on again."""
        self.rows, self._tokens = self._at_step

    def validation_begins(self) -> None:
        """Marks that a validation begins."""
        if self._validating_since is None:
            self._validating_since = time.monotonic()

    def validation_ends(self, whole: bool = True) -> None:
        """Marks that training begins or goes on; a validation of ``whole`` data is timed."""
        if self._validating_since is None:
            return
        seconds = time.monotonic() - self._validating_since
        self._validating_since = None
        self.validated += seconds
        self._validation = seconds if whole else self._validation

    def _training_time(self) -> float:
        return time.monotonic() - self.validated

    def rates(self) -> dict[str, float]:
        """Returns ``steps``, ``rows`` and ``tokens`` per second; empty before the second step."""
        if len(self._marks) < 2:
            return {}
        first, last = self._marks[0], self._marks[-1]
        seconds = max(last[0] - first[0], 1e-9)
        names = ("steps", "rows", "tokens")
        rates = {
            n: float(b - a) / seconds for n, a, b in zip(names, first[1:], last[1:], strict=True)
        }
        return {name: rate for name, rate in rates.items() if rate > 0}

    def eta(self, steps_left: int, validations_left: int = 0) -> float | None:
        """Returns the seconds that are left, validations among them; ``None`` if not known yet.

        Validations are not counted as long as none was timed.
        """
        steps = self.rates().get("steps")
        if not steps:
            return None
        seconds = steps_left / steps
        if self._validation is not None:
            seconds += validations_left * self._validation
            if self._validating_since is not None:
                passed = time.monotonic() - self._validating_since
                seconds += max(0.0, self._validation - passed)
        return seconds


def rows_and_tokens(batch: Any) -> tuple[int, int | Tensor]:
    """Returns the rows and the tokens of a batch; 0 for what it does not say.

    The tokens of a padded batch on a GPU are a scalar there.
    """
    if isinstance(batch, dict):
        mask = batch.get("attention_mask")
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
        rows = len(tensors[0]) if tensors else 0
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return rows, int(mask.sum()) if mask.device.type == "cpu" else mask.sum()
        ids = batch.get("input_ids")
        return rows, ids.numel() if isinstance(ids, Tensor) else 0
    if isinstance(batch, (list, tuple)) and batch:
        return rows_and_tokens(batch[0])
    return (len(batch), 0) if isinstance(batch, Tensor) and batch.ndim else (0, 0)
