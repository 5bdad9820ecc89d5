"""Throughput and remaining time of a run, and machine load, sampled to ``load.jsonl``."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import torch
from torch import Tensor

from lightning_peft.processes import usable_cores
from lightning_peft.runs.folder import RunFolder

# Steps that the pace is averaged over: a validation in between shows, and passes.
WINDOW = 50
# Seconds between two lines: a hundredth of the time so far, between these.
SHORTEST, LONGEST = 1.0, 10.0


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


class LoadLog:
    """Writes the load of the machine, more seldom the longer a run takes.

    Each line has ``seconds`` since the run began, over all its sessions; ``cpu_percent``, how much
    of the usable cores this process has used since the last line, and ``process_bytes``, its
    resident memory; with a GPU ``cuda_bytes``, what torch holds there, and, where ``nvidia-ml-py``
    (with ROCm, ``amdsmi``) is installed, ``cuda_percent``, for how much of the last second a kernel
    was running.

    Args:
        folder: The folder of the run.
        earlier: Seconds of the sessions before this one.
        more: Returns further numbers for a line.

    Attributes:
        device: The device that the run trains on, once it is known. A new thread has device 0.
    """

    def __init__(
        self, folder: RunFolder, earlier: float, more: Callable[[], dict[str, float]]
    ) -> None:
        self._folder, self._more = folder, more
        self.device: torch.device | None = None
        self._began, self._earlier = time.monotonic(), earlier
        self._process, self._cores = psutil.Process(), usable_cores()
        # The first call only begins to count.
        self._process.cpu_percent()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _write(self) -> None:
        while not self._closed.wait(min(LONGEST, max(SHORTEST, self._passed / 100))):
            # A disk that is full ends the run in the thread that trains.
            with suppress(OSError):
                self._folder.append(self._folder.load, self.line())

    @property
    def _passed(self) -> float:
        return time.monotonic() - self._began

    def line(self) -> dict[str, Any]:
        """Returns the load since the last line."""
        found: dict[str, Any] = {
            "seconds": round(self._earlier + self._passed, 1),
            "cpu_percent": round(self._process.cpu_percent() / self._cores, 1),
            "process_bytes": self._process.memory_info().rss,
            **self._more(),
        }
        # What would start CUDA here, or wait for it, could disturb the run.
        on_gpu = self.device is not None and self.device.type == "cuda"
        if on_gpu and torch.cuda.is_initialized():
            found["cuda_bytes"] = torch.cuda.memory_reserved(self.device)
            # Drivers and their packages refuse with errors of many classes.
            with suppress(Exception):
                found["cuda_percent"] = torch.cuda.utilization(self.device)
        return found
