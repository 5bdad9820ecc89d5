"""Default training precision of this machine, determined without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from gradio_app.runs.machine import query_nvidia_smi, this_machine
from gradio_app.settings import has_zero_gpu
from lightning_peft.task_registry import TASKS

# The family of tasks whose activations overflow float16: those of T5 do.
_NO_FLOAT16 = "seq2seq"
Kind = Literal["gpu", "old_gpu", "cpu", "old_cpu", "unknown"]
_BY_KIND: dict[Kind, str] = {
    "gpu": "bf16-mixed",
    "cpu": "bf16-mixed",
    "unknown": "bf16-mixed",
    "old_gpu": "16-mixed",
    "old_cpu": "32-true",
}
# GPUs of compute capability 8.0 and newer compute bfloat16 themselves.
_CAPABILITY = 8
_CPUINFO = Path("/proc/cpuinfo")
# CPU flags of Linux, on x86 and on ARM.
_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Precision:
    """The default of ``Trainer(precision=...)``, and the reason in ``fields.precision_REASON``."""

    value: str
    reason: str


def default_precision(task: str, tiny: bool, kind: Kind) -> Precision:
    """Returns the default."""
    if tiny:
        return Precision("32-true", "tiny")
    if kind == "old_gpu" and task in TASKS and TASKS[task].family == _NO_FLOAT16:
        return Precision("32-true", "no_float16")
    return Precision(_BY_KIND[kind], kind)


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
