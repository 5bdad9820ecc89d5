"""Values of all processes that train together."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def group_size() -> int:
    """Number of processes of the default group; 1 without one."""
    distributed = import_module("torch.distributed")
    grouped = distributed.is_available() and distributed.is_initialized()
    return int(distributed.get_world_size()) if grouped else 1


def gathered(value: Any, processes: int) -> list[Any]:
    """Returns ``value`` of each of so many processes, by rank; all of them have to ask.

    One process asks nobody: it may train alone while a process group of an earlier run is there.
    """
    if processes == 1:
        return [value]
    everyone: list[Any] = [None] * processes
    import_module("torch.distributed").all_gather_object(everyone, value)
    return everyone
