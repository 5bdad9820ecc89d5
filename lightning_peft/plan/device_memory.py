"""Device memory, by GPU name or size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from lightning_peft.errors import ConfigError, similar_names

# In the decimal gigabytes that makers print on them, which is never more than the card has.
_GIGABYTES = {
    "p100": 16, "t4": 16, "v100-16": 16, "v100-32": 32, "l4": 24, "l40": 48, "l40s": 48,
    "a10": 24, "a10g": 24, "a16": 16, "a30": 24, "a40": 48, "a100-40": 40, "a100-80": 80,
    "h100": 80, "h100-80": 80, "h200": 141, "b200": 180,
    "rtx2080ti": 11, "rtx3060": 12, "rtx3070": 8, "rtx3080": 10, "rtx3080ti": 12,
    "rtx3090": 24, "rtx3090ti": 24, "rtx4060": 8, "rtx4060ti": 8, "rtx4070": 12, "rtx4070ti": 12,
    "rtx4080": 16, "rtx4090": 24, "rtx5060": 8, "rtx5070": 12, "rtx5070ti": 16, "rtx5080": 16,
    "rtx5090": 32, "rtxa4000": 16, "rtxa5000": 24, "rtxa6000": 48, "rtx6000ada": 48,
}  # fmt: skip
# Limits of a container: most bytes, bytes in use, and the name of the part of these that is given
# up where memory is short.
_CONTAINER_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
_CONTAINER = Path("/sys/fs/cgroup")
_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


@dataclass(frozen=True)
class DeviceMemory:
    """A device, as far as a plan is concerned."""

    name: str
    bytes: int
    kind: Literal["cuda", "cpu"]
    # What of these bytes the process already uses, where it runs.
    held: int = 0


def device_memory(text: str) -> DeviceMemory:
    """Returns the device that ``text`` means.

    It is an amount such as ``"24GB"`` or ``"22.5GiB"``, the name of a GPU such as ``"rtx4090"`` or
    ``"A100-40"``, or ``"this"``: what is free on this machine's first GPU, or in its memory.
    """
    if text.strip().lower() == "this":
        return this_device()
    amount = re.fullmatch(r"\s*([\d.]+)\s*([GM]i?B?)\s*", text, flags=re.IGNORECASE)
    if amount and amount[1].count(".") <= 1 and amount[1] != ".":
        unit = amount[2].upper()
        size = float(amount[1]) * _UNITS[unit if unit.endswith("B") else f"{unit}B"]
        if size > 0:
            return DeviceMemory(text.strip(), round(size), "cuda")
    plain = re.sub(r"nvidia|geforce|tesla|sxm\d|pcie|hbm\d|[\s_-]|gb$", "", text.lower())
    for name in _GIGABYTES:
        if name.replace("-", "") in (plain, f"rtx{plain}"):
            return DeviceMemory(name, _GIGABYTES[name] * 10**9, "cuda")
    raise ConfigError(
        f"--gpu {text!r} is neither an amount such as 24GB nor a GPU of the planner's list"
        f"{similar_names(plain, _GIGABYTES)}, and not 'this'. Known: {', '.join(_GIGABYTES)}. Give "
        "the amount for others."
    )


def this_device() -> DeviceMemory:
    """Returns the free memory of the first GPU that torch sees, or of this machine."""
    if torch.cuda.is_available():
        gpu = torch.device("cuda", 0)
        return DeviceMemory(torch.cuda.get_device_name(gpu), free_memory(gpu), "cuda")
    return DeviceMemory("this machine's memory", available_memory(), "cpu")


def free_memory(device: torch.device) -> int:
    """Returns the bytes that can still be used on ``device``, a GPU or this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def available_memory(container: Path = _CONTAINER) -> int:
    """Returns the bytes of memory that can still be used, within the limit of a container."""
    free = psutil.virtual_memory().available
    for files in _CONTAINER_FILES:
        try:
            most, used, stat = (
                (container / name).read_text(encoding="utf-8") for name in files[:3]
            )
            kept = dict(line.split() for line in stat.splitlines()).get(files[3], "0")
            return max(0, min(free, int(most) - int(used) + int(kept)))
        except (OSError, ValueError):
            # Another version of cgroups, or "max".
            continue
    return free


def readable(size: float) -> str:
    """Returns bytes in decimal units, as makers of devices count: ``"7.2 GB"``."""
    for limit, divisor, unit in ((1e9, 1e9, "GB"), (1e6, 1e6, "MB")):
        if abs(size) >= limit:
            shown = size / divisor
            return f"{shown:,.1f} {unit}" if abs(shown) < 100 else f"{shown:,.0f} {unit}"
    return f"{size / 1e3:,.0f} kB"
