"""Quantized bases kept in memory between runs of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from lightning_peft.engine.backends.registry import Backend

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class _KeptBase:
    facts: dict[str, Any]
    tensors: Mapping[str, Tensors]
    sums: dict[str, int]


_kept: ContextVar[dict[tuple[Path, torch.device], _KeptBase] | None] = ContextVar(
    "quantized_bases_kept", default=None
)


@contextmanager
def quantized_bases_kept() -> Iterator[None]:
    """Within the body, the codes of the last base that comes out of the cache stay in memory.

    They stay on the device that they were loaded to, for the next load of the same base. Codes that
    were changed in place since are read from the cache again.
    """
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


@contextmanager
def unused_base_dropped() -> Iterator[None]:
    """Within the body, a run loads its models; a base that none of them has is dropped then.

    It would take memory of the device for the whole run.
    """
    kept = _kept.get() or {}
    before = {key: ref(base) for key, base in kept.items()}
    yield
    for key, base in before.items():
        # A load puts in another object.
        if kept.get(key) is base():
            kept.pop(key, None)


def kept_weights(
    entry: Path, backend: Backend, device: torch.device, read: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Returns the weights of an entry, from memory where they are unchanged, else by ``read``."""
    kept = _kept.get()
    if kept is None:
        return read()
    known = kept.pop((entry, device), None)
    if known is not None and known.sums == _sums(known.tensors):
        weights = {
            name: replace(one, stored=backend.from_state_tensors(known.tensors[name], device))
            for name, one in known.facts.items()
        }
    else:
        # First, as there may not be memory for two bases.
        known = None
        kept.clear()
        weights = read()
    if weights:
        # Not the parameters, which a run moves to another device or replaces.
        tensors = {name: backend.state_tensors(one.stored) for name, one in weights.items()}
        facts = {name: replace(one, stored=None) for name, one in weights.items()}
        kept[entry, device] = _KeptBase(facts, tensors, _sums(tensors))
    return weights


def _sums(tensors: Mapping[str, Tensors]) -> dict[str, int]:
    """Returns a sum of the bits of each weight, which is quick on any device."""
    return {name: sum(map(_sum, parts.values())) for name, parts in tensors.items()}


def _sum(tensor: Tensor) -> int:
    octets = tensor.reshape(-1).view(torch.uint8)
    whole = len(octets) // 8 * 8
    return int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum())
