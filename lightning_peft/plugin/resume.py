"""Resuming as if nothing had happened: random state, and the place inside an epoch.

Lightning restores loops and optimizers, but neither the random generators nor the position in a
shuffled DataLoader, so that a resumed run sees other dropout masks and other batches.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_peft.plugin.extension import extended

T = TypeVar("T")


def random_state() -> dict[str, Any]:
    """Returns the state of Python's, NumPy's and torch's generators as tensors and numbers."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {
            "version": version,
            "internal": _to_tensor(internal),
            "gauss": gauss,
        },
        "numpy": {
            "kind": str(kind),
            "keys": _to_tensor(keys),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators into a state that :func:`random_state` returned."""
    python, numpy = state["python"], state["numpy"]
    internal = tuple(_from_tensor(python["internal"]).tolist())
    random.setstate((python["version"], internal, python["gauss"]))
    keys, position = _from_tensor(numpy["keys"]), numpy["position"]
    np.random.set_state((numpy["kind"], keys, position, numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])


def _to_tensor(words: Any) -> torch.Tensor:
    # As signed integers: torch cannot send unsigned ones to other processes.
    return torch.from_numpy(np.asarray(words, dtype=np.uint32).view(np.int32).copy())


def _from_tensor(words: torch.Tensor) -> Any:
    return words.numpy().view(np.uint32)


class ResumableLoader(Generic[T]):
    """Extension of a ``DataLoader`` object that can start in the middle of an epoch.

    It remembers the random state from which the epoch's order was drawn. Going back there, making
    the iterator again and skipping what was consumed gives the same remaining batches. Generic as
    ``DataLoader`` is: an object can only be given a class of the same layout.

    Attributes:
        resume_at: A :meth:`position` where the next iterator starts.
        epoch_start: Random state at the start of the epoch, and what is the loader's own.
        yielded: Number of batches handed out in this epoch.
    """

    _iterator: Any
    resume_at: dict[str, Any] | None = None
    epoch_start: Mapping[str, Any] = {}
    yielded: int = 0

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches of the epoch, or of what is left of it.

        A generator, so that nothing is drawn before the first batch is asked for: Lightning makes
        iterators early, and drops some.
        """
        position, self.resume_at = self.resume_at or {"yielded": 0, "start": self._own()}, None
        skipped, start = position["yielded"], position["start"]
        before = random_state()
        if start["workers"] and self._iterator is None:
            # Workers that outlive an epoch draw their seed once, and that is in the past.
            super().__iter__()  # type: ignore[misc]
        set_random_state(start if skipped else before)
        for generator, state in zip(self._generators(), start["generators"], strict=False):
            generator.set_state(state)
        self.epoch_start, self.yielded = {**random_state(), **self._own()}, skipped
        iterator = super().__iter__()  # type: ignore[misc]
        for _ in range(skipped):
            next(iterator, None)
        if skipped:
            set_random_state(before)
        for batch in iterator:
            self.yielded += 1
            yield batch

    def position(self, ahead: int, between_epochs: bool) -> dict[str, Any]:
        """Returns where the loader is, to be assigned to ``resume_at``.

        Args:
            ahead: Number of batches that were fetched and not consumed.
            between_epochs: Whether the epoch that was begun is over.
        """
        if self.resume_at is not None:
            return self.resume_at
        consumed = 0 if between_epochs else self.yielded - ahead
        if consumed <= 0:
            return {"yielded": 0, "start": self._own()}
        return {"yielded": consumed, "start": self.epoch_start}

    def _generators(self) -> list[torch.Generator]:
        owners = (self, getattr(self, "sampler", None), getattr(self, "batch_sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        unique = {id(item): item for item in found if isinstance(item, torch.Generator)}
        return list(unique.values())

    def _own(self) -> dict[str, Any]:
        return {
            "generators": [generator.get_state() for generator in self._generators()],
            "workers": self._iterator is not None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: this method tells Lightning that the loader can resume.

        The position is saved by the strategy, which does so for every process.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing, as there is nothing in ``state``."""


def make_resumable(loader: Any) -> Any:
    """Returns a copy of a ``DataLoader`` that can resume; other loaders are returned as they are.

    The copy shares dataset and samplers with the user's loader, which stays what it was.
    """
    if not isinstance(loader, DataLoader) or hasattr(loader, "load_state_dict"):
        return loader
    resumable = copy.copy(loader)
    resumable.__class__ = extended(ResumableLoader, type(loader))
    # Workers that outlive an epoch belong to one loader.
    resumable._iterator = None
    return resumable
