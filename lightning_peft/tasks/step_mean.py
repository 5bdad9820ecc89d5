"""Token mean over an optimizer step, across micro-batches and processes.

A batch's loss is a mean over its tokens. Lightning averages these means over accumulated batches
and over processes, so that a token of a short batch counts more than one of a long batch. Here the
gradient of each batch is weighted by its number of tokens, and divided by that of the whole step
before anything looks at it: clipping, callbacks and the optimizer get the gradient of one batch
that holds all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Keeps a weighted loss near its size, for the gradient scaler of float16. A power of two, so that
# weighting rounds nothing.
_TYPICAL_ITEMS = 1024


class StepMean:
    """Sums over the batches of one optimizer step, and the weights that make them one mean."""

    def __init__(self) -> None:
        self._items: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._weight: Tensor | None = None

    def reset(self) -> None:
        """Forgets the batches so far: a new optimizer step begins."""
        self._items, self._sums, self._weight = None, {}, None

    def add(
        self, items: Tensor, means: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Adds a batch and returns the means over all items of the step so far, float32.

        ``items`` is what the ``means`` of the batch are over, such as its labelled tokens; all are
        scalars. ``reduce`` sums a tensor over all processes.
        """
        items = items.detach().float()
        sums = [torch.where(items > 0, mean.detach() * items, 0) for mean in means.values()]
        count, *totals = reduce(torch.stack([items, *sums])).unbind()
        self._weight = items / _TYPICAL_ITEMS
        self._items = count if self._items is None else self._items + count
        for name, total in zip(means, totals, strict=True):
            self._sums[name] = self._sums.get(name, 0) + total
        return {name: total / self._items.clamp(min=1) for name, total in self._sums.items()}

    def weighted(self, loss: Tensor) -> Tensor:
        """Returns the loss of the batch that was added last, weighted by its items."""
        return loss if self._weight is None else loss * self._weight.to(loss.device)

    def normalize(self, optimizer: torch.optim.Optimizer, shares: int) -> None:
        """Divides the gradients by the items of the step, which ends here.

        ``shares`` is what Lightning divided by already: accumulated batches times processes.
        """
        if self._items is not None:
            factor = shares * _TYPICAL_ITEMS / self._items.clamp(min=1)
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.grad.mul_(factor.to(param.grad.device))
        self.reset()

    def around(
        self, closure: Callable[[], Any], optimizer: torch.optim.Optimizer, shares: int
    ) -> Callable[[], Any]:
        """Returns ``closure``, the last backward pass of a step, with :meth:`normalize` after."""

        def run() -> Any:
            result = closure()
            self.normalize(optimizer, shares)
            return result

        return run
