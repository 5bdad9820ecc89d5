"""Batches that adapters are initialised from, and what of them counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batches:
    """Batches of this process, and the module's step on one.

    Attributes:
        make: Returns the batches from the first; called again where more are needed.
        run: Returns the loss of the module on one batch, with gradients where they are enabled.
        processes: How many processes do this, each on as many batches of its own.
    """

    make: Callable[[], Iterable[Any]]
    run: Callable[[Any], Any]
    processes: int


def token_mask(batch: Any) -> Tensor | None:
    """Which tokens are attended to, ``(rows, tokens)``; ``None`` where a batch has no tokens."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        return None
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
    return mask.bool()


def layer_rows(inputs: Any, mask: Tensor | None) -> Tensor:
    """The rows that count of a layer's input, ``(rows, features)``."""
    x: Tensor = inputs if isinstance(inputs, Tensor) else inputs[0]
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])
