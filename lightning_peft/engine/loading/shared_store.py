"""Caching of a base that is sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module

from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.backends.packed import current_share
from lightning_peft.engine.gathering import gather_device, gathered, share_group
from lightning_peft.engine.loading.quantized_cache import (
    CachedWeight,
)


class GatheredWeights(Mapping[str, CachedWeight]):
    """Weights that are put together when they are read: by all processes, in one order.

    One that is read another time has no values.
    """

    def __init__(
        self, known: Mapping[str, CachedWeight], layers: Mapping[str, QuantizedLayer]
    ) -> None:
        self._known, self._layers = known, layers
        self._rest = list(known)

    def __getitem__(self, name: str) -> CachedWeight:
        if name not in self._rest:
            return self._known[name]
        self._rest.remove(name)
        packed, part = self._layers[name].packed, self._layers[name]._parameters["weight"]
        assert packed is not None
        distributed = import_module("torch.distributed")
        share = current_share()
        assert share is not None
        count, group = share.count, share_group(share.count)
        # The first part is the largest.
        padded = part.new_zeros(-(-packed.size // count), device=gather_device(group))
        padded[: len(part)] = part
        whole = padded.new_empty(count * len(padded))
        distributed.all_gather_into_tensor(whole, padded, group=group)
        stored = packed.views(whole[: packed.size].to(part.device))
        return replace(self._known[name], stored=stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def finish(self) -> None:
        """Takes part in the reading of others."""
        while self._rest:
            self[self._rest[0]]


def writers(names: list[tuple[str, list[str]]], sizes: list[int], processes: int) -> list[bool]:
    """Returns for each entry whether any process writes it, so that all have to give their parts.

    Nobody does where they did not load the same, or only some of their machines had the entry.
    """
    everyone = gathered((names, sizes), processes)
    same = all(theirs == names for theirs, _ in everyone)
    return [same and any(each[i] for _, each in everyone) for i in range(len(names))]
