"""Verification results, one line per check."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_peft.errors import LifecycleError, itemize


@dataclass
class Check:
    """One checked property.

    Attributes:
        name: The property.
        passed: Whether it holds; ``None`` where it cannot be checked now.
        detail: What was measured, or which layers fail.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass
class Verification:
    """The result of :func:`lightning_peft.verify`.

    Attributes:
        checks: In the order of what they are about: effect, gradients, evaluation, base, files.
    """

    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raises a LifecycleError that lists the failed checks, if there are any."""
        failed = [f"{check.name}: {check.detail}" for check in self.checks if check.passed is False]
        if failed:
            raise LifecycleError("Adapter verification failed:" + itemize(failed))

    def __str__(self) -> str:
        """Returns one line per check."""
        marks = {True: "ok  ", False: "FAIL", None: "--  "}
        return "\n".join(f"{marks[c.passed]} {c.name}: {c.detail}" for c in self.checks)


def abbreviated(names: list[str], limit: int = 5) -> str:
    """Returns the first names in one line, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
