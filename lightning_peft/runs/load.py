"""Machine load during a run, sampled by a thread to ``load.jsonl``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import torch

from lightning_peft.processes import usable_cores
from lightning_peft.runs.folder import RunFolder

# Seconds between two lines.
SHORTEST, LONGEST = 1.0, 10.0


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
