"""Results of checks; a crashed check does not stop the others."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from lightning_peft.torchvision_errors import loading_problem

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check, whose name is the same in every release and on every machine."""

    # "failed" where training needs it, "warning" where some training does.
    status: Status
    detail: str
    remedy: str = ""
    name: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Check:
    """A check to run; whatever it raises is a finding too, with its remedy and status."""

    name: str
    run: Callable[[], CheckResult]
    remedy: str
    broken: Status = "failed"

    def result(self) -> CheckResult:
        """Runs the check."""
        started = time.perf_counter()
        # What matters of them is in the details; on the screen they would be between the lines.
        with warnings.catch_warnings(record=True):
            try:
                found = self.run()
            # The parts under trial raise whatever their loaders and kernels do.
            except Exception as error:
                problem = loading_problem(error)
                detail = error_line(error) if problem is None else "transformers does not load"
                found = CheckResult(self.broken, detail, problem or self.remedy)
        return replace(found, name=self.name, seconds=round(time.perf_counter() - started, 2))

    def skipped(self, why: str) -> CheckResult:
        """Returns the finding of a check that cannot run."""
        return CheckResult("skipped", why, name=self.name)


def error_line(error: BaseException) -> str:
    """Returns the kind of an error and the start of its message."""
    words = " ".join(str(error).split())
    shown = words if len(words) <= 300 else f"{words[:300]} ..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
