"""What a test needs to know of one kind of LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader


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
        trusted: Whether the module writes objects into its checkpoints, so that only
            ``weights_only=False`` reads them.
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
    trusted: bool = False

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

    def loaders(self) -> tuple[Any, Any]:
        """Returns the training and validation loaders."""
        return tuple(DataLoader(self.data(), batch_size=None) for _ in range(2))

    def loss(self, module: Any, batch: Any, index: int) -> torch.Tensor:
        """Returns the loss of ``module``, in the mode that it is in."""
        module.log = lambda *args, **kwargs: None
        try:
            return module.validation_step(batch, index)
        finally:
            del module.log

    def check_layers(self, adapted: set[str], quantized: set[str]) -> None:
        """Asserts which layers have adapters, and which were quantized."""
        assert last_names(adapted) == self.adapted
        expected = self.adapted if self.quantized is None else self.quantized
        assert last_names(quantized) in (set(), expected)


def names(*layers: str) -> frozenset[str]:
    """Returns a set of names."""
    return frozenset(layers)


def last_names(layers: Iterable[str]) -> set[str]:
    """Returns the last parts of dotted names."""
    return {name.rpartition(".")[2] for name in layers}
