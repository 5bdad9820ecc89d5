"""Operations and bytes of a training step, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from lightning_peft import engine
from lightning_peft.compat.torch import TorchDispatchMode, flop_formula, schema_of, tree_iter

# Parameter, gradient and both moments are read, and all but the gradient written, in float32.
_OPTIMIZER_TRAFFIC = 7 * 4


@dataclass(frozen=True)
class Work:
    """What a process does in one step, over all batches whose gradients are added up."""

    # Multiplications and additions of its matrix products and of attention.
    flops: int = 0
    # Bytes that its operations read and write, each of them for itself.
    moved: int = 0
    # Bytes of weights that it has of all processes together, gathered from them.
    gathered: int = 0
    # Bytes of gradients.
    averaged: int = 0

    def sent(self, processes: int) -> int:
        """Returns the bytes that a process sends, and receives, in rings.

        To gather ``S`` bytes, each of ``N`` sends ``(N - 1) / N`` of ``S``; to average them, twice
        as much.
        """
        return (self.gathered + 2 * self.averaged) * (processes - 1) // processes


class WorkCounter(TorchDispatchMode):
    """Within the body, the operations that run are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and counts it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        workspace = engine.workspace_bytes(func, args, kwargs)
        formula = flop_formula(func)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        elif workspace:
            # The product with a quantized weight.
            self.flops += 2 * out.numel() * args[0].shape[-1]
        if not _moves_nothing(func):
            # Of a table, rows are read.
            read = args[1:] if func.name() == "aten::embedding" else args
            self.moved += 2 * workspace + _bytes(read) + _bytes(out)
        return out

    def work(
        self, accumulate: int, batches: int, trained: int, gathered: int, averaged: int
    ) -> Work:
        """Returns the work of a step of ``accumulate`` batches, of which ``batches`` were counted.

        ``trained`` are weights; ``gathered`` are bytes for a batch, and ``averaged`` those of a
        step.
        """
        return Work(
            self.flops * accumulate // batches,
            self.moved * accumulate // batches + trained * _OPTIMIZER_TRAFFIC,
            gathered * accumulate,
            averaged,
        )


def _bytes(values: Any) -> int:
    return sum(one.nbytes for one in tree_iter(values) if isinstance(one, Tensor))


@cache
def _moves_nothing(func: Any) -> bool:
    """Whether an operation makes a view, or memory without values."""
    returns: list[Any] = getattr(schema_of(func), "returns", [])
    views = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    return views or "empty" in func.name() or func.namespace == "prim"
