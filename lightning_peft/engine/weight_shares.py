"""Planned size of each process's share of a sharded base."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_peft.engine.backends.packed import packed_bytes
from lightning_peft.engine.backends.registry import backend_of
from lightning_peft.engine.sharding import gathered_blocks, spread_parameters


@dataclass(frozen=True)
class SharedWeight:
    """A frozen weight that processes share.

    Attributes:
        bytes: Of the whole weight, with the constants of a quantized one.
        rows: Size of the dimension that is cut up; a quantized weight is one row of bytes.
        block: Name of the block that it is gathered with; ``None`` where it is outside of blocks.
        is_quantized: Whether it is a quantized one.
    """

    bytes: int
    rows: int
    block: str | None
    is_quantized: bool

    def share(self, processes: int) -> int:
        """Returns the bytes of the largest part, to which the others are padded."""
        return -(-self.rows // processes) * (self.bytes // self.rows)


def shared_weights(module: nn.Module) -> list[SharedWeight]:
    """Returns the weights that ``sharding="fsdp2"`` would spread, also of a module on meta."""
    block_of = {
        id(param): name
        for name, block in gathered_blocks(module).items()
        for param in block.parameters()
    }
    found = []
    for param in {id(one): one for one in spread_parameters(module).values()}.values():
        backend = backend_of(param)
        size = param.nbytes if backend is None else packed_bytes(backend, param)
        rows = param.shape[0] if backend is None else size
        found.append(SharedWeight(size, rows, block_of.get(id(param)), backend is not None))
    return [one for one in found if one.rows]
