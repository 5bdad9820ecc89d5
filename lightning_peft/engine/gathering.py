"""Values of all processes that train together."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def gathered(value: Any) -> list[Any]:
    """Returns ``value`` of each process of the default group, by rank; all have to ask."""
    distributed = import_module("torch.distributed")
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, value)
    return everyone
