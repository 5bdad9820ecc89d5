"""Comparison of the called blocks of a sharded base between processes."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from lightning_peft.engine.gathering import gathered
from lightning_peft.errors import UnsupportedError, itemize


class CalledBlocks:
    """Refuses forward passes for which processes call different blocks.

    FSDP gathers by order: parts of two blocks of equal size would be put together to one. Numbers
    of calls that differ end in an error of torch or in the timeout of the process group.
    """

    def __init__(
        self, module: nn.Module, blocks: dict[str, nn.Module], device: torch.device
    ) -> None:
        self._names = list(blocks)
        self._group_device = device
        self._called: list[int] = []
        module.register_forward_pre_hook(self._begin)
        for number, block in enumerate(blocks.values()):
            block.register_forward_pre_hook(partial(self._note, number))
        module.register_forward_hook(self._compare)

    def _begin(self, *_: Any) -> None:
        self._called = []

    def _note(self, number: int, *_: Any) -> None:
        self._called.append(number)

    def _compare(self, *_: Any) -> None:
        distributed = import_module("torch.distributed")
        # Integers in tuples have the same hash in each process.
        mine = torch.tensor([hash(tuple(self._called))], device=self._group_device)
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everyone, mine)
        if len(set(torch.cat(everyone).tolist())) == 1:
            return
        rows = [
            f"process {rank}: " + ", ".join(repr(self._names[number]) for number in numbers)
            for rank, numbers in enumerate(gathered(self._called, len(everyone)))
        ]
        raise UnsupportedError(
            "The processes called different blocks in one forward pass:"
            + itemize(rows, 8)
            + "\nsharding='fsdp2' gathers the parts of a block from all processes, so they "
            "computed with a mixture of several. Call the same blocks everywhere (no LayerDrop, "
            "stochastic depth or experts chosen by each process), or use sharding=None."
        )
