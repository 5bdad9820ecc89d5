"""Repeated blocks of a model, the units of checkpointing and sharding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from lightning_peft.compat.transformers import GradientCheckpointingLayer
from lightning_peft.engine.adapters import adapted_layers

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# The blocks inside of a block are taken instead of it where they hold about all of it.
_NEARLY_ALL = 0.8


def all_blocks(part: nn.Module) -> list[nn.Module]:
    """Returns the blocks of an adapted part: transformers' own, and :func:`repeated_blocks`."""
    library = [m for m in part.modules() if isinstance(m, GradientCheckpointingLayer)]
    return [*library, *repeated_blocks(part)]


def repeated_blocks(part: nn.Module) -> list[nn.Module]:
    """Returns the repeated blocks with adapters inside that are not of transformers."""
    holders = {id(layer) for layer in adapted_layers(part).values()}
    foreign = {
        id(child)
        for m in part.modules()
        if isinstance(m, (PreTrainedModel, GradientCheckpointingLayer))
        for child in m.modules()
    }
    return list({id(b): b for b in _blocks_in(part, holders, foreign)}.values())


def _blocks_in(module: nn.Module, adapted: set[int], foreign: set[int]) -> Iterator[nn.Module]:
    children = [child for child in module._modules.values() if child is not None]
    repeated: set[int] = set()
    if isinstance(module, _CONTAINERS):
        candidates = [child for child in children if _can_be_block(child, adapted, foreign)]
        counts = Counter(type(child) for child in candidates)
        repeated = {id(child) for child in candidates if counts[type(child)] > 1}
    for child in children:
        if id(child) in foreign:
            continue
        deeper = list(_blocks_in(child, adapted, foreign))
        if id(child) in repeated and _parameters(deeper) < _NEARLY_ALL * _parameters([child]):
            yield child
        else:
            yield from deeper


def _can_be_block(block: nn.Module, adapted: set[int], foreign: set[int]) -> bool:
    """A block holds adapted layers, is none itself, and computes in its class's ``forward``."""
    return (
        id(block) not in adapted
        and id(block) not in foreign
        and "forward" not in block.__dict__
        and not isinstance(block, (nn.ModuleList, nn.ModuleDict))
        and any(id(child) in adapted for child in block.modules())
    )


def _parameters(blocks: list[nn.Module]) -> int:
    return sum(p.numel() for p in {id(p): p for b in blocks for p in b.parameters()}.values())
