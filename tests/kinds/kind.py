"""What a test needs to know of one kind of LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Kind:
    """One LightningModule in the usual style of its field, and what is expected of it.

    Attributes:
        name: Short name of the test.
        field: Heading in the documentation.
        title: What a reader of the documentation recognises it by.
        module: Makes the module; what it draws is the same every time.
        batches: Makes the batches that it trains and validates on.
        strategy: Arguments of the strategy, for modules that need more than none.
        adapted: Last names of the layers that are expected to get adapters.
        quantized: The same for 4 bits; by default as adapted.
        idle: Names of adapted layers that the module never uses, or feeds with zeros.
        refused: By method, the pattern of the error.
        note: What a user should know.
    """

    name: str
    field: str
    title: str
    module: Callable[[], Any]
    batches: Callable[[], list[Any]]
    strategy: dict[str, Any] = field(default_factory=dict)
    adapted: frozenset[str] = frozenset()
    quantized: frozenset[str] | None = None
    idle: frozenset[str] = frozenset()
    refused: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def make(self) -> Any:
        """Returns a new module; the same weights every time, whatever was drawn before."""
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return self.module()

    def data(self) -> list[Any]:
        """Returns the batches."""
        with torch.random.fork_rng():
            torch.manual_seed(12)
            return self.batches()


def names(*layers: str) -> frozenset[str]:
    """Returns a set of names."""
    return frozenset(layers)
