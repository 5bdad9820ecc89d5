"""Hardware and package versions of a run."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from lightning_peft.processes import usable_cores

PACKAGES = (
    "lightning-peft",
    "torch",
    "lightning",
    "pytorch-lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "torchmetrics",
)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what a result depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """Returns the hardware of a run: CPU, cores, memory, GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }


def _of_proc(file: str, name: str) -> str:
    """Returns the value of a name in a file of ``/proc``; ``""`` where there is none."""
    place = Path("/proc", file)
    lines = place.read_text(encoding="utf-8").splitlines() if place.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, "")


def _processor() -> str:
    return _of_proc("cpuinfo", "model name") or platform.processor() or platform.machine()


def peak_memory() -> dict[str, int]:
    """Returns the most memory that this process has used so far, in bytes.

    ``process_bytes`` is the peak of its resident memory: imports, and the pages of mapped files
    that were read, included; what other processes of the run use is not. ``cuda_bytes`` is what
    torch allocated on the GPU, where there is one.
    """
    memory = {"process_bytes": _peak_resident()}
    if torch.cuda.is_available():
        memory["cuda_bytes"] = torch.cuda.max_memory_allocated()
    return memory


def reset_peak_memory() -> None:
    """Lets :func:`peak_memory` count from now on, where the system can: Linux, and the GPU."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_resident() -> int:
    # Linux starts ``ru_maxrss`` at what the parent held when it started the process, such as the
    # page's server or a test runner.
    if known := _of_proc("self/status", "VmHWM"):
        return 1024 * int(known.split()[0])
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows, which has no `resource`
        return int(memory.peak_wset)
    resource: Any = import_module("resource")
    most = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return most if sys.platform == "darwin" else most * 1024
