"""Shards of frozen tensors, for a base shared by several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """One of ``count`` parts of a tensor, cut along its first dimension as FSDP does.

    Attributes:
        rank: Which of them.
        count: How many processes, of numbers that follow each other, share a base.
        on_cpu: Whether it stays in the memory of the CPU until it is gathered.
    """

    rank: int
    count: int
    on_cpu: bool = False

    def of(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy of this part on ``device``, or the CPU; of few rows, the last ones are empty."""
        parts = tensor.detach().chunk(self.count)
        part = parts[self.rank] if self.rank < len(parts) else tensor.detach()[:0]
        layout = torch.contiguous_format
        device = torch.device("cpu") if self.on_cpu else device
        return torch.empty_like(part, device=device, memory_format=layout).copy_(part)


_current: ContextVar[Share | None] = ContextVar("share", default=None)


@contextmanager
def keeping_share(share: Share | None) -> Iterator[None]:
    """Within the body, this thread keeps only ``share`` of each weight that it quantizes."""
    token = _current.set(share)
    try:
        yield
    finally:
        _current.reset(token)


def current_share() -> Share | None:
    """The part that is kept now; ``None`` for whole weights."""
    return _current.get()
