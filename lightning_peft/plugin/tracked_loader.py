"""Positions in data loaders, and their restoration.

Lightning restores the number of the batch, but not the order of a shuffled loader. The loop
iterates over the loaders of the user through :class:`TrackedLoader`; they themselves are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lightning_peft.plugin.random_state import random_state, set_random_state


class TrackedLoader:
    """An iterable that counts what its loader hands out, and can start in the middle of an epoch.

    It remembers the random state from which the epoch's order was drawn. Going back there, making
    the iterator again and skipping what was consumed gives the same remaining batches.
    """

    def __init__(self, loader: Any, resume_at: Mapping[str, Any] | None = None) -> None:
        self.loader = loader
        self.resume_at = resume_at
        self._epoch_start: dict[str, Any] = {}
        self._before_fetch: dict[str, Any] | None = None
        self._yielded = 0

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def _iterator(self) -> Any:
        # Lightning shuts the workers down through this attribute, where there is one.
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.loader._iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches of the epoch, or of what is left of it.

        A generator, so that nothing is drawn before the first batch is asked for: Lightning makes
        iterators early, and drops some.
        """
        position, self.resume_at = self.resume_at, None
        skipped, start = 0, self._own_state()
        if position is not None:
            skipped, start = position["yielded"], position["start"]
        before = random_state()
        # The order of the epoch was drawn already.
        drawn = "torch" in start
        if start["workers"] and getattr(self, "_iterator", True) is None:
            # Workers that outlive an epoch draw their seed once, and that is in the past.
            iter(self.loader)
        set_random_state(start if drawn else before)
        for generator, state in zip(_generators(self.loader), start["generators"], strict=False):
            generator.set_state(state)
        self._epoch_start, self._yielded = {**random_state(), **self._own_state()}, skipped
        iterator = iter(self.loader)
        for _ in range(skipped):
            next(iterator, None)
        if drawn:
            set_random_state((position or {}).get("fetch") or before)
        fetched_ahead = length_of(self.loader) is None
        while True:
            if fetched_ahead:
                self._before_fetch = random_state(devices=False)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._yielded += 1
            yield batch

    def position(self, ahead: int, between_epochs: bool) -> dict[str, Any]:
        """Returns where the loader is, to be assigned to ``resume_at``.

        ``ahead`` batches were fetched and not trained on; ``between_epochs``, the epoch is over.
        """
        if self.resume_at is not None:
            return dict(self.resume_at)
        now = self._own_state()
        if between_epochs or not self._yielded:
            return {"yielded": 0, "start": now, "now": now}
        return {
            "yielded": max(self._yielded - ahead, 0),
            "start": self._epoch_start,
            "fetch": self._before_fetch if ahead else None,
            "now": now,
        }

    def _own_state(self) -> dict[str, Any]:
        return {
            "generators": [generator.get_state() for generator in _generators(self.loader)],
            "workers": getattr(self, "_iterator", None) is not None,
        }


def next_epoch_position(position: Mapping[str, Any]) -> dict[str, Any]:
    """Returns where the epoch after ``position`` starts."""
    start = position.get("now", position["start"])
    own = {"generators": start["generators"], "workers": start["workers"]}
    return {"yielded": 0, "start": own, "now": own}


def generator_states(loaders: list[Any]) -> list[list[torch.Tensor]]:
    """Returns the states of the generators that belong to each loader."""
    return [[g.get_state() for g in _generators(loader)] for loader in loaders]


def set_generator_states(loaders: list[Any], states: list[list[torch.Tensor]]) -> None:
    """Puts back what :func:`generator_states` returned."""
    for loader, own in zip(loaders, states, strict=False):
        for generator, state in zip(_generators(loader), own, strict=False):
            generator.set_state(state)


def is_stateful(loader: Any) -> bool:
    """Returns whether a loader saves and restores its position itself, through Lightning."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _generators(loader: Any) -> list[torch.Generator]:
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    unique = {id(item): item for item in found if isinstance(item, torch.Generator)}
    return list(unique.values())


def length_of(loader: Any) -> int | None:
    """Returns how many batches a loader has, or ``None`` where it has no length."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
