"""Whether this machine computes bfloat16 itself or emulates it, without torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from gradio_app.runs.machine import query_nvidia_smi, this_machine
from gradio_app.settings import has_zero_gpu

# GPUs of compute capability 8.0 and newer compute bfloat16 themselves.
_CAPABILITY = 8
_CPUINFO = Path("/proc/cpuinfo")
# CPU flags of Linux, on x86 and on ARM.
_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
Kind = Literal["gpu", "old_gpu", "cpu", "old_cpu", "unknown"]


@cache
def detect_bfloat16() -> Kind:
    """Returns of what kind this machine is; on a Space, of what kind the GPU that it is lent."""
    if has_zero_gpu():
        return "gpu"
    if this_machine().gpu:
        return classify_gpu(query_nvidia_smi("compute_cap"))
    return classify_cpu(_CPUINFO)


def classify_gpu(capability: str) -> Kind:
    """Returns the kind of a GPU by its compute capability, such as ``8.6``."""
    major = capability.strip().partition("\n")[0].partition(".")[0]
    if not major.isdigit():
        return "unknown"
    return "gpu" if int(major) >= _CAPABILITY else "old_gpu"


def classify_cpu(cpuinfo: Path) -> Kind:
    """Returns the kind of a CPU by the flags that Linux lists."""
    if not cpuinfo.is_file():
        return "unknown"
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    listed = [line for line in lines if line.startswith(("flags", "Features"))]
    if not listed:
        return "unknown"
    return "cpu" if _FLAGS & set(listed[0].partition(":")[2].split()) else "old_cpu"
