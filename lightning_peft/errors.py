"""Exceptions raised by this package, one class per kind of user error.

Each message names the problem, the user's value, the reason and the fix.
Problems that can be found together are reported together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LightningPeftError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(LightningPeftError, ValueError):
    """The arguments contradict each other or hold a value that no method accepts."""


class TargetModulesError(LightningPeftError, ValueError):
    """Names of layers or submodules match nothing, or match something that cannot be adapted."""


class LifecycleError(LightningPeftError, RuntimeError):
    """Steps were taken in an order in which trained adapters would be lost or never trained."""


class UnsupportedError(LightningPeftError, NotImplementedError):
    """A combination that would be silently wrong and is refused instead."""


class CheckpointError(LightningPeftError, RuntimeError):
    """A checkpoint or adapter file is damaged, unsafe, or does not fit the module."""


class BaseMismatchError(CheckpointError):
    """An adapter meets another base model than the one it was trained on."""


class HubError(LightningPeftError, RuntimeError):
    """The hub cannot be reached, or refuses what was asked of it."""


class StorageError(LightningPeftError, OSError):
    """Files of a run cannot be written: the disk is full, or the folder is gone or read-only."""


class DivergenceError(LightningPeftError, ArithmeticError):
    """Training left values that are NaN or infinite in what it trains."""


def similar_names(wanted: str, known: Iterable[str]) -> str:
    """Returns ``"; near names: ..."`` with what of ``known`` is like ``wanted``, or ``""``."""
    names = list(known)
    # An abbreviation may be far from what it stands for.
    begun = [name for name in names if wanted.strip("-") and name.startswith(wanted)]
    alike = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
    near = list(dict.fromkeys([*begun, *alike]))[:3]
    return f"; near names: {', '.join(near)}" if near else ""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text; the name of its class where it has none.

    With the first entry of the list that follows, where the line ends in a colon.
    """
    first, *rest = [line.strip() for line in str(error).strip().splitlines()] or [""]
    if first.endswith(":") and rest:
        first = f"{first} {rest[0].removeprefix('- ')}"
    return first or type(error).__name__


def itemize(problems: Iterable[str], limit: int = 12) -> str:
    """Returns ``problems`` as an indented list of at most ``limit`` lines, then a count."""
    rows = list(problems)
    lines = "".join(f"\n  - {row}" for row in rows[:limit])
    rest = len(rows) - limit
    return lines + (f"\n  - ... and {rest} more" if rest > 0 else "")
