"""Gathering of values from all processes."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch


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


def from_first(value: Any, processes: int) -> Any:
    """Returns ``value`` of the first of so many processes, all of which have to ask.

    Tensors in it are on the CPU.
    """
    held = [value]
    if processes > 1:
        import_module("torch.distributed").broadcast_object_list(held)
    return held[0]


def share_group(count: int) -> Any:
    """Returns the process group of the ``count`` processes that share a base with this one.

    They have numbers that follow each other. All processes of the default group have to ask.
    """
    distributed = import_module("torch.distributed")
    world = distributed.group.WORLD
    return world if count == distributed.get_world_size() else _group_of(world, count)


def gather_device(group: Any) -> torch.device:
    """Returns where tensors have to be that ``group`` gathers: NCCL takes none of the CPU."""
    if import_module("torch.distributed").get_backend(group) != "nccl":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@cache
def _group_of(world: Any, count: int) -> Any:
    distributed = import_module("torch.distributed")
    size, rank = distributed.get_world_size(), distributed.get_rank()
    groups = [distributed.new_group(range(n, n + count)) for n in range(0, size, count)]
    return groups[rank // count]
