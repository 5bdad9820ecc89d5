"""Hardware of this machine without torch: GPU from the driver, memory and cores."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from lightning_peft.processes import usable_cores

_DRIVER = Path("/proc/driver/nvidia/gpus")
# GB per billion weights that a run takes at its fullest, and GB that the libraries take besides:
# what the planner predicts for an 8B model at 512 tokens and one row, checkpointing with QLoRA
# (docs/planner.md).
_LORA, _QLORA, _OVERHEAD = 2.6, 1.2, 0.8
# On a CPU, time is the limit before memory is.
_CPU_MAX_BILLIONS = 0.5
_SIZES = (0.1, 0.3, 0.5, 1, 1.5, 3, 4, 7, 8, 13, 14, 24, 32, 70)


@dataclass(frozen=True)
class Machine:
    """What a machine has: its first NVIDIA GPU, if any, and its memory in bytes.

    ``free_bytes`` are those of main memory now; ``cores`` those that this process may use.
    """

    gpu: str | None
    gpu_bytes: int
    memory_bytes: int
    free_bytes: int
    cores: int

    def max_billions(self, quantized: bool) -> float:
        """Returns about how many billion parameters a base may have, rounded to usual sizes."""
        memory = (self.gpu_bytes if self.gpu else self.memory_bytes) / 1e9
        most = (memory - _OVERHEAD) / (_QLORA if quantized else _LORA)
        if not self.gpu:
            most = min(most, _CPU_MAX_BILLIONS)
        return max((size for size in _SIZES if size <= most), default=0)


def this_machine() -> Machine:
    """Returns the hardware of this machine."""
    memory = psutil.virtual_memory()
    name, total = _gpu()
    return Machine(name, total, memory.total, memory.available, usable_cores())


@cache
def _gpu() -> tuple[str | None, int]:
    listed = parse_nvidia_smi(query_nvidia_smi("name,memory.total"))
    return listed or _from_driver(_DRIVER) or (None, 0)


def query_nvidia_smi(names: str) -> str:
    """Returns values of the GPUs by nvidia-smi, a line for each; empty if it cannot tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    argv = [tool, f"--query-gpu={names}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_nvidia_smi(text: str) -> tuple[str, int] | None:
    """Returns name and bytes of the first GPU that nvidia-smi lists, in MiB."""
    name, _, memory = text.strip().partition("\n")[0].rpartition(",")
    digits = memory.strip()
    return (name.strip(), int(digits) * 2**20 if digits.isdigit() else 0) if name else None


def _from_driver(driver: Path) -> tuple[str, int] | None:
    for file in sorted(driver.glob("*/information")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip(), 0
    return None
