"""Quantized weights packed into one byte parameter, and shards of frozen tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine.backends.base import QuantizationBackend
from lightning_peft.engine.layers.mixin import require_whole

# Every tensor starts where any dtype may.
_ALIGNMENT = 16


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


class PackedWeight:
    """The way from the bytes of a parameter back to a quantized weight, without a copy.

    Bytes, not bfloat16: whoever casts, averages or normalizes numbers leaves them alone. Tables
    that are the same for all weights stay outside.

    Attributes:
        template: The weight without values.
        size: Number of its bytes.
    """

    def __init__(
        self, backend: QuantizationBackend[Any], stored: Any, device: torch.device
    ) -> None:
        self.backend = backend
        pieces: list[Tensor] = []
        tables = {id(table) for table in backend.tables(stored)}

        def take(tensor: Tensor) -> Tensor:
            if id(tensor) in tables:
                return tensor.to(device)
            octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            pieces.append(F.pad(octets, (0, -octets.numel() % _ALIGNMENT)))
            return tensor.detach().to("meta")

        self.template = backend.map_tensors(stored, take)
        self._octets: Tensor | None = torch.cat(pieces)
        self._read_on = device
        self.size = self._octets.numel()
        self._count = 1
        self._opened: tuple[Tensor, Any] | None = None

    def release(self, share: Share | None = None) -> nn.Parameter:
        """Hands the bytes over, once: the parameter to store, uint8 of shape ``(n,)``."""
        octets, self._octets = self._octets, None
        assert octets is not None
        if share is not None:
            octets, self._count = share.of(octets, self._read_on), share.count
        return nn.Parameter(octets, requires_grad=False)

    def open(self, octets: Any) -> Any:
        """The quantized weight whose bytes are ``octets``: views of them."""
        require_whole(octets, 1 if octets.numel() == self.size else self._count)
        # The same object each time, whose memory is given back in between.
        if self._opened is None or self._opened[0] is not octets:
            self._opened = octets, self.views(octets)
        return self._opened[1]

    def views(self, octets: Tensor) -> Any:
        """As :meth:`open`, of bytes that are not kept alive here."""
        start = 0

        def view(tensor: Tensor) -> Tensor:
            nonlocal start
            if not tensor.is_meta:
                return tensor
            size = tensor.numel() * tensor.element_size()
            piece = octets.detach()[start : start + size]
            start += size + -size % _ALIGNMENT
            return piece.view(tensor.dtype).view(tensor.shape)

        return self.backend.map_tensors(self.template, view)


def packed_bytes(backend: QuantizationBackend[Any], stored: Any) -> int:
    """Returns how many bytes a quantized weight takes when packed; no value is read."""
    pieces = [stored, *backend.constants(stored)]
    return sum(tensor.nbytes + -tensor.nbytes % _ALIGNMENT for tensor in pieces)
