"""Resuming as if nothing had happened: random state, and the place inside an epoch.

Lightning restores loops and optimizers, but neither the random generators nor the position in a
shuffled DataLoader, so that a resumed run sees other dropout masks and other batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

T = TypeVar("T")


def rng_state() -> dict[str, Any]:
    """Returns the state of Python's, NumPy's and torch's generators as tensors and numbers."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {
            "version": version,
            "internal": torch.tensor(internal, dtype=torch.int64).to(torch.uint32),
            "gauss": gauss,
        },
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.uint32)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts the generators into a state that :func:`rng_state` returned."""
    python, numpy = state["python"], state["numpy"]
    internal = tuple(int(value) for value in python["internal"].to(torch.int64))
    random.setstate((python["version"], internal, python["gauss"]))
    np.random.set_state(
        (
            numpy["kind"],
            numpy["keys"].numpy(),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached"],
        )
    )
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])


class ResumableLoader(Generic[T]):
    """Extension of a ``DataLoader`` object that can start in the middle of an epoch.

    It remembers the random state from which the epoch's order was drawn. Going back there, making
    the iterator again and skipping what was consumed gives the same remaining batches. Generic as
    ``DataLoader`` is: an object's class can only be changed to one of the same layout.
    """

    resume_consumed: Callable[[], int]
    resume_pending: dict[str, Any] | None
    resume_at_start: torch.Tensor | None
    resume_at_first: torch.Tensor | None

    def state_dict(self) -> dict[str, Any]:
        """Returns the position: nothing between epochs, else where the epoch began and how far."""
        consumed = self.resume_consumed()
        if consumed == 0 or self.resume_at_first is None:
            return {"consumed": 0}
        return {
            "consumed": consumed,
            "at_start": self.resume_at_start,
            "at_first": self.resume_at_first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iterator start at a position that :meth:`state_dict` returned."""
        self.resume_pending = state if state.get("consumed") else None

    def __iter__(self) -> Iterator[Any]:
        """Returns an iterator over the (rest of the) epoch."""
        pending, self.resume_pending = self.resume_pending, None
        if pending is None:
            self.resume_at_start = torch.get_rng_state()
            self.resume_at_first = None
            return self._first_noted(super().__iter__())  # type: ignore[misc]
        now = torch.get_rng_state()
        torch.set_rng_state(pending["at_start"])
        iterator = super().__iter__()  # type: ignore[misc]
        torch.set_rng_state(pending["at_first"])
        for _ in range(pending["consumed"]):
            next(iterator, None)
        torch.set_rng_state(now)
        self.resume_at_start = pending["at_start"]
        self.resume_at_first = pending["at_first"]
        return iterator

    def _first_noted(self, iterator: Iterator[Any]) -> Iterator[Any]:
        self.resume_at_first = torch.get_rng_state()
        yield from iterator


_CLASSES: dict[type, type] = {}


def make_resumable(loader: Any, consumed: Callable[[], int]) -> Any:
    """Extends a ``DataLoader`` in place; loaders with a state of their own are left alone.

    Args:
        loader: The training DataLoader.
        consumed: Returns how many batches of the current epoch were consumed; 0 when it is over.
    """
    if not isinstance(loader, DataLoader) or hasattr(loader, "load_state_dict"):
        return loader
    cls = type(loader)
    if cls not in _CLASSES:
        _CLASSES[cls] = type(f"Resumable{cls.__name__}", (ResumableLoader, cls), {})
    loader.__class__ = _CLASSES[cls]
    loader.resume_consumed = consumed
    loader.resume_pending = loader.resume_at_start = loader.resume_at_first = None
    return loader
