"""All checks in order, with their dependencies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_peft.doctor import packages, places, remedies
from lightning_peft.doctor.results import Check, CheckResult, Status


@dataclass(frozen=True)
class DoctorOptions:
    """What the user wants to know about."""

    device: str = "auto"
    # Where runs would be written.
    folder: Path = Path()
    # Whether the hub is needed; None asks it without needing it.
    hub: bool | None = None


def run_checks(
    options: DoctorOptions, around: Callable[[str], AbstractContextManager[Any]]
) -> Iterator[CheckResult]:
    """Runs every check, in the context ``around(name)``, and gives its finding at once."""

    def run(check: Check) -> CheckResult:
        with around(check.name):
            return check.result()

    yield run(Check("python", packages.check_python, remedies.METADATA))
    releases = run(Check("lightning releases", packages.check_compromised, remedies.METADATA))
    yield releases
    yield run(Check("packages", packages.check_requirements, remedies.METADATA))
    yield run(
        Check(
            "packages together", packages.check_compatibility, remedies.METADATA, broken="warning"
        )
    )
    stopped = ""
    if releases.status == "failed":
        stopped = f"{releases.name} failed: nothing else is imported"
    for check, decides in _heavy(options):
        result = check.skipped(stopped) if stopped else run(check)
        yield result
        if decides and not stopped and result.status == "failed":
            stopped = f"{check.name} failed"
    yield run(Check("folder", lambda: places.check_folder(options.folder), remedies.FOLDER))
    needed = bool(options.hub)
    broken: Status = "failed" if needed else "warning"
    hub = Check("hub", lambda: places.check_hub(needed), remedies.METADATA, broken)
    if options.hub is False:
        yield hub.skipped("--no-hub")
    elif releases.status == "failed":
        yield hub.skipped(stopped)
    else:
        yield run(hub)


def _heavy(options: DoctorOptions) -> Iterator[tuple[Check, bool]]:
    """Gives the checks that import torch, each with whether the rest depends on it."""

    def hardware() -> Any:
        return import_module("lightning_peft.doctor.hardware")

    def training() -> Any:
        return import_module("lightning_peft.doctor.training")

    def device() -> str:
        return str(hardware().chosen_device(options.device))

    def quantized(bits: int) -> CheckResult:
        found: CheckResult = training().check_quantized(bits, device())
        return found

    def optimizer(kind: str) -> CheckResult:
        found: CheckResult = training().check_optimizer(kind, device())
        return found

    yield Check("torch", lambda: hardware().check_torch(options.device), remedies.TORCH), True
    yield Check("device", lambda: hardware().check_device(device()), remedies.TORCH), True
    yield Check("bf16", lambda: hardware().check_bf16(device()), remedies.NO_BF16, "warning"), False
    kinds: dict[int, Status] = {4: "failed", 8: "warning"}
    for bits, broken in kinds.items():
        name, remedy = f"bitsandbytes {bits}-bit", remedies.quantized(bits)
        yield Check(name, partial(quantized, bits), remedy, broken), False
    for kind in ("paged_adamw_32bit", "adamw_8bit"):
        remedy = remedies.OWN_OPTIMIZER
        yield Check(f"optimizer {kind}", partial(optimizer, kind), remedy, "warning"), False
    compiler = Check("compiler", lambda: hardware().check_compiler(), remedies.COMPILER, "warning")
    yield compiler, False
