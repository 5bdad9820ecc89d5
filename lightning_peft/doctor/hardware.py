"""torch, and the capabilities of its device."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

import psutil
import torch
from torch import nn

from lightning_peft.doctor import remedies
from lightning_peft.doctor.results import CheckResult, Status, error_line

_GIB = 2**30
_CPUINFO = Path("/proc/cpuinfo")
# As the kernel of Linux calls them, on x86 and on ARM.
_BF16_FLAGS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "BF16"}
# bfloat16 keeps 8 bits; two small layers add up a few roundings.
_BF16_ERROR = 0.05


def chosen_device(requested: str) -> str:
    """Returns ``"cuda"`` or ``"cpu"`` for ``"auto"``, and anything else as it is."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if requested == "auto" else requested


def check_torch(device: str) -> CheckResult:
    """Says which build of torch this is, and whether a GPU of this machine is out of its reach."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    detail = f"{torch.__version__}, built for {built}, {torch.get_num_threads()} CPU threads"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return CheckResult("ok", detail)
    driver = nvidia_devices()
    status: Status = "failed" if device == "cuda" else "warning"
    if driver and torch.version.cuda is None and torch.version.hip is None:
        detail += f"; nvidia-smi lists {driver}, which a CPU build of torch cannot use"
        return CheckResult(status, detail, remedies.TORCH)
    if driver:
        why = "; ".join(" ".join(str(warning.message).split()) for warning in caught)
        detail += f"; nvidia-smi lists {driver}, but torch sees no CUDA device{': ' * bool(why)}"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedy = (
            f"CUDA_VISIBLE_DEVICES={hidden!r} hides devices: unset it."
            if hidden is not None
            else f"Update the NVIDIA driver, or else: {remedies.TORCH}"
        )
        return CheckResult(status, detail + why, remedy)
    if device == "cuda":
        remedy = "Use --device cpu, or a machine with an NVIDIA GPU, its driver and a CUDA build."
        return CheckResult("failed", f"{detail}; there is no CUDA device", remedy)
    return CheckResult("ok", detail)


def nvidia_devices() -> str:
    """Returns the GPUs listed by nvidia-smi, without torch; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    # "GPU 0: NVIDIA H200 (UUID: GPU-...)"
    return ", ".join(line.partition(" (UUID")[0] for line in lines if line.startswith("GPU "))


def check_device(device: str) -> CheckResult:
    """Computes something on the device and says how much memory it has."""
    ones = torch.ones(64, 64, device=device)
    total = float((ones @ ones).sum())
    if total != 64**3:
        remedy = "Compute on another device, and have this one looked at."
        return CheckResult("failed", f"{device} sums 64^3 ones up to {total:g}", remedy)
    if device == "cpu":
        memory = psutil.virtual_memory()
        free, whole = memory.available / _GIB, memory.total / _GIB
        name = platform.processor() or platform.machine()
        detail = f"cpu: {name}, {psutil.cpu_count()} cores, {free:.1f} of {whole:.1f} GiB free"
        return CheckResult("ok", detail)
    shown = []
    for index in range(torch.cuda.device_count()):
        free_bytes, all_bytes = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        shown.append(
            f"cuda:{index}: {torch.cuda.get_device_name(index)}, compute capability "
            f"{major}.{minor}, {free_bytes / _GIB:.1f} of {all_bytes / _GIB:.1f} GiB free"
        )
    return CheckResult("ok", "; ".join(shown))


def check_bf16(
    device: str, network: nn.Module | None = None, cpuinfo: Path = _CPUINFO
) -> CheckResult:
    """Runs forward and backward under bfloat16 autocast and compares them with float32."""
    remedy = remedies.NO_BF16
    torch.manual_seed(0)
    if network is None:
        network = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    network, batch = network.to(device), torch.randn(16, 64, device=device)
    outcome = {}
    for enabled in (False, True):
        network.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            output = network(batch)
        output.float().square().mean().backward()
        grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        outcome[enabled] = (output.dtype, torch.cat(grads))
    dtype, (exact, rounded) = outcome[True][0], (outcome[False][1], outcome[True][1])
    if dtype != torch.bfloat16:
        return CheckResult("warning", f"autocast gave {dtype}", remedy)
    error = float((rounded - exact).norm() / exact.norm())
    if not error <= _BF16_ERROR:
        detail = f"gradients are off by {error:.2g} of their size, at most {_BF16_ERROR} expected"
        return CheckResult("warning", detail, remedy)
    detail = f"autocast ran forward and backward, {error:.2g} off float32"
    native = native_bf16(device, cpuinfo)
    if native == "":
        slow = "precision='16-mixed'" if device == "cuda" else "precision='32-true'"
        detail += "; the hardware emulates it, which is slow"
        return CheckResult("warning", detail, f"Where speed matters: Trainer({slow}).")
    detail += "" if native is None else f"; native ({native})"
    return CheckResult("ok", detail)


def native_bf16(device: str, cpuinfo: Path = _CPUINFO) -> str | None:
    """Returns the support of bfloat16: empty for none, ``None`` where that is not known."""
    if device == "cuda":
        if torch.version.hip:
            return None
        major, minor = torch.cuda.get_device_capability()
        return f"compute capability {major}.{minor}" if major >= 8 else ""
    if not cpuinfo.is_file():
        return None
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    listed = [line for line in lines if line.startswith(("flags", "Features"))]
    if not listed:
        return None
    flags = set(listed[0].partition(":")[2].split())
    return ", ".join(shown for flag, shown in _BF16_FLAGS.items() if flag in flags)


def check_compiler() -> CheckResult:
    """Looks for the compiler that ``torch.compile`` calls, and has it say its version."""
    remedy = remedies.COMPILER
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    compiler = next((tool for name in names if (tool := shutil.which(name))), None)
    if compiler is None:
        return CheckResult("warning", f"no {' or '.join(names)} found", remedy)
    try:
        process = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=15
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return CheckResult("warning", f"{compiler}: {error_line(error)}", remedy)
    version = (process.stdout or process.stderr).strip().partition("\n")[0]
    # Microsoft's has no such option and reports its version all the same.
    if process.returncode and Path(compiler).stem != "cl":
        return CheckResult("warning", f"{compiler} fails: {version}", remedy)
    return CheckResult("ok", version)
