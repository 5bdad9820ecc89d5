"""Chunked cross-entropy for large vocabularies.

Only the logits, which exist anyway, wait for the backward pass, with two numbers for each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.compat.torch import FakeTensor

# Logits that are widened at a time: near a core on CPUs, and enough for a kernel elsewhere.
_CHUNK, _CHUNK_ON_ACCELERATORS = 1 << 19, 1 << 22


def summed_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Returns the cross-entropy, float32, summed over the rows whose target counts.

    Args:
        logits: ``(rows, classes)``.
        targets: ``(rows,)``, int64.
        ignore_index: The target that does not count.
    """
    total: Tensor = SummedCrossEntropy.apply(logits, targets, ignore_index)
    return total


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy, summed over the rows whose target counts."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        """Returns the sum, float32; see :func:`summed_cross_entropy`."""
        counts = targets != ignore_index
        # A class that exists, for rows that do not count.
        places = targets.where(counts, 0).unsqueeze(1)
        # Apart, as in log_softmax: in their sum, large logits would swallow the logarithm.
        largest, totals, picked = logits.new_empty(3, len(logits), 1, dtype=torch.float32).unbind()
        for rows, (some, at) in row_chunks(_step(logits), logits, places):
            wide = some.to(torch.float32, copy=True)
            torch.amax(wide, 1, keepdim=True, out=largest[rows])
            torch.gather(wide.sub_(largest[rows]), 1, at, out=picked[rows])
            torch.sum(wide.exp_(), 1, keepdim=True, out=totals[rows])
        ctx.save_for_backward(logits, targets, places, largest, totals)
        ctx.ignore_index = ignore_index
        return (totals.log() - picked).squeeze(1).where(counts, 0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Returns the gradient of the logits, in their dtype."""
        logits, targets, places, largest, totals = ctx.saved_tensors
        if torch.is_grad_enabled():
            # For gradients of gradients.
            total = F.cross_entropy(
                logits.float(), targets, ignore_index=ctx.ignore_index, reduction="sum"
            )
            return *torch.autograd.grad(total, logits, gradients[0], create_graph=True), None, None
        scales = gradients[0] * (targets != ctx.ignore_index).unsqueeze(1) / totals
        of_logits = torch.empty_like(logits)
        for rows, (some, at, scale) in row_chunks(_step(logits), logits, places, scales):
            wide = some.to(torch.float32, copy=True).sub_(largest[rows]).exp_()
            wide.scatter_add_(1, at, -totals[rows])
            torch.mul(wide, scale, out=of_logits[rows])
        return of_logits, None, None


@torch.no_grad()
def cross_entropy_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the summed cross-entropy, float32, and its gradient in the dtype of the logits.

    Args:
        logits: ``(rows, classes)``; no gradient is recorded.
        targets: ``(rows,)``, int64; all of them count.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    gradient = torch.empty_like(logits)
    for rows, (some, at) in row_chunks(_step(logits), logits, targets.unsqueeze(1)):
        wide = some.to(torch.float32, copy=True)
        wide.sub_(wide.amax(1, keepdim=True))
        picked = wide.gather(1, at)
        sums = wide.exp_().sum(1, keepdim=True)
        total += (sums.log() - picked).sum()
        wide.scatter_add_(1, at, -sums)
        torch.div(wide, sums, out=gradient[rows])
    return total, gradient


def _step(logits: Tensor) -> int:
    piece = _CHUNK if logits.device.type == "cpu" else _CHUNK_ON_ACCELERATORS
    return max(1, piece // max(1, logits.shape[1]))


def row_chunks(step: int, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yields ``step`` rows at a time: where they are, and those of each tensor."""
    for start in range(0, len(tensors[0]), step):
        rows = slice(start, start + step)
        yield rows, [tensor[rows] for tensor in tensors]
        if start >= 2 * step and isinstance(tensors[0], FakeTensor):
            # A plan: the third is made while sums over the first two are there. Others take as much
            # and have no values either.
            return
