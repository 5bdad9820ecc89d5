"""All checks in their order, and which of them make no sense after others failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_peft.doctor import packages, places, ways_out
from lightning_peft.doctor.findings import Check, Finding, Status


@dataclass(frozen=True)
class Wishes:
    """What the user wants to know about.

    Attributes:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        folder: Where runs would be written.
        hub: Whether the hub is needed; ``None`` asks it without needing it.
    """

    device: str = "auto"
    folder: Path = Path()
    hub: bool | None = None


def examine(
    wishes: Wishes, around: Callable[[str], AbstractContextManager[Any]]
) -> Iterator[Finding]:
    """Runs every check and gives its finding at once.

    Args:
        wishes: What to look at.
        around: Entered with the name of each check while it runs.
    """

    def run(check: Check) -> Finding:
        with around(check.name):
            return check.finding()

    yield run(Check("python", packages.check_python, ways_out.METADATA))
    releases = run(Check("lightning releases", packages.check_compromised, ways_out.METADATA))
    yield releases
    yield run(Check("packages", packages.check_requirements, ways_out.METADATA))
    yield run(Check("packages together", packages.check_fit, ways_out.METADATA, broken="warning"))
    stopped = ""
    if releases.status == "failed":
        stopped = f"{releases.name} failed: nothing is imported beside them"
    for check, decides in _heavy(wishes):
        found = check.skipped(stopped) if stopped else run(check)
        yield found
        if decides and not stopped and found.status == "failed":
            stopped = f"{check.name} failed"
    yield run(Check("folder", lambda: places.check_folder(wishes.folder), ways_out.FOLDER))
    needed = bool(wishes.hub)
    broken: Status = "failed" if needed else "warning"
    hub = Check("hub", lambda: places.check_hub(needed), ways_out.METADATA, broken)
    if wishes.hub is False:
        yield hub.skipped("--no-hub")
    elif releases.status == "failed":
        yield hub.skipped(stopped)
    else:
        yield run(hub)


def _heavy(wishes: Wishes) -> Iterator[tuple[Check, bool]]:
    """Gives the checks that import torch, each with whether the rest depends on it."""

    def hardware() -> Any:
        return import_module("lightning_peft.doctor.hardware")

    def training() -> Any:
        return import_module("lightning_peft.doctor.training")

    def device() -> str:
        return str(hardware().chosen_device(wishes.device))

    def quantized(bits: int) -> Check:
        name = f"bitsandbytes {bits}-bit"
        broken: Status = "failed" if bits == 4 else "warning"
        way_out = ways_out.quantized(bits)
        return Check(name, lambda: training().check_quantized(bits, device()), way_out, broken)

    def optimizer(kind: str) -> Check:
        name = f"optimizer {kind}"
        broken: Status = "failed" if kind.startswith("paged") else "warning"
        way_out = ways_out.OWN_OPTIMIZER
        return Check(name, lambda: training().check_optimizer(kind, device()), way_out, broken)

    yield Check("torch", lambda: hardware().check_torch(wishes.device), ways_out.TORCH), True
    yield Check("device", lambda: hardware().check_device(device()), ways_out.TORCH), True
    yield Check("bf16", lambda: hardware().check_bf16(device()), ways_out.NO_BF16, "warning"), False
    yield quantized(4), False
    yield quantized(8), False
    yield optimizer("paged_adamw_32bit"), False
    yield optimizer("adamw_8bit"), False
    yield (
        Check("compiler", lambda: hardware().check_compiler(), ways_out.COMPILER, "warning"),
        False,
    )
