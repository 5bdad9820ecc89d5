"""Checks across processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine.fingerprint import exact_checksum
from lightning_peft.engine.record import require_record
from lightning_peft.engine.sharding import gathered_blocks, local_part, spread_parameters
from lightning_peft.engine.training.optimizer_groups import held_ids
from lightning_peft.engine.verification.gradients import active_tensors
from lightning_peft.engine.verification.result import abbreviated

# Storages are a little larger than what is in them.
_ALLOWED = 1.05


@dataclass
class RestoredState:
    """What a checkpoint had, to be compared with what training starts from.

    Attributes:
        tensors: Dtype and checksum of its tensors, by their names in the module.
        states: For each optimizer, how many parameters had a state.
    """

    tensors: dict[str, tuple[torch.dtype, int]] = field(default_factory=dict)
    states: list[int] = field(default_factory=list)

    def note_tensors(self, state: Mapping[str, Any]) -> None:
        """Remembers the tensors of a ``state_dict``."""
        tensors = {name: one for name, one in state.items() if isinstance(one, Tensor)}
        self.tensors = {name: (one.dtype, exact_checksum(one)) for name, one in tensors.items()}

    def note_states(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Remembers the sizes of the states of optimizers."""
        self.states = [len(one.get("state", ())) for one in states]


def checksums_of_trained(module: nn.Module) -> dict[str, int]:
    """Returns checksums of the bits of everything that trains, by name."""
    return {n: exact_checksum(p) for n, p in module.named_parameters() if p.requires_grad}


def own_problems(
    module: nn.Module, optimizers: Iterable[Any], restored: RestoredState
) -> list[str]:
    """Returns the problems that this process finds by itself, before the first step."""
    found = list(optimizers)
    return [
        *_problems_of_share(module),
        *_problems_of_optimizers(module, found),
        *_problems_of_restore(module, found, restored),
    ]


def _problems_of_share(module: nn.Module) -> list[str]:
    """A process that holds more of a shared base than its share saves little or no memory."""
    shards = require_record(module).shards
    if shards == 1:
        return []
    names = {id(param): name for name, param in spread_parameters(module).items()}
    held, share, whole = 0, 0, []
    for param in {id(one): one for one in spread_parameters(module).values()}.values():
        size = local_part(param).untyped_storage().nbytes()
        part = -(-param.shape[0] // shards) * param[:1].numel() * param.element_size()
        held, share = held + size, share + part
        if size > _ALLOWED * part:
            whole.append(names[id(param)])
    if held <= _ALLOWED * share:
        return []
    return [
        f"{held:,} bytes of the frozen base are here, and its share is {share:,}, so that "
        f"sharding saves little to no memory: {abbreviated(whole)}"
    ]


def _problems_of_optimizers(module: nn.Module, optimizers: list[Any]) -> list[str]:
    held = held_ids(optimizers)
    unheld = [name for name, param in active_tensors(module).items() if id(param) not in held]
    return [f"no optimizer holds {abbreviated(unheld)}"] if unheld else []


def _problems_of_restore(
    module: nn.Module, optimizers: list[Any], restored: RestoredState
) -> list[str]:
    adapters = active_tensors(module)
    lost = [
        name
        for name, param in adapters.items()
        if name in restored.tensors
        and restored.tensors[name][0] == param.dtype
        and restored.tensors[name][1] != exact_checksum(param)
    ]
    problems = []
    if restored.tensors:
        lost += [name for name in adapters if name not in restored.tensors]
    if lost:
        problems.append(
            f"{len(lost)} of {len(adapters)} adapter tensors are not those of the checkpoint: "
            f"{abbreviated(lost)}"
        )
    for number, (optimizer, count) in enumerate(zip(optimizers, restored.states, strict=False)):
        # Some keep the states of other processes' parameters there.
        if len(optimizer.state) < count and not hasattr(optimizer, "consolidate_state_dict"):
            problems.append(
                f"optimizer {number} ({type(optimizer).__name__}) has states of "
                f"{len(optimizer.state)} parameters, and the checkpoint of {count}"
            )
    return problems


def gradient_problems(
    module: nn.Module, gradients: Mapping[str, str], infinite: Iterable[str]
) -> list[str]:
    """Returns the problems that this process finds with the gradients of the first step.

    Args:
        module: With adapters.
        gradients: ``"alive"``, ``"zero"`` or ``"none"`` by the name of an adapted layer.
        infinite: Names of tensors whose gradient is not finite.
    """
    problems = []
    if names := list(infinite):
        problems.append(f"gradients are not finite: {abbreviated(names)}")
    silent = [name for name, kind in gradients.items() if kind != "alive"]
    # Single layers may rest; of a base that is put together, most do where that went wrong.
    if require_record(module).shards > 1 and 2 * len(silent) > len(gradients):
        problems.append(
            f"{len(gradients) - len(silent)} of {len(gradients)} adapted layers got a gradient, "
            f"none at {abbreviated(silent)}"
        )
    return problems


def differing_problems(what: str, everyone: list[Mapping[str, Any]]) -> list[str]:
    """Returns where values by name are others in some processes than in the first."""
    problems = []
    for rank, mine in enumerate(everyone):
        names = [n for n in {**everyone[0], **mine} if mine.get(n) != everyone[0].get(n)]
        if names:
            problems.append(f"process {rank} has other {what} than process 0: {abbreviated(names)}")
    return problems


class GatheredBits:
    """Looks, in the next forward pass, whether what is gathered is what it is gathered from.

    Each process compares its own part of each weight, bit for bit, and keeps a checksum of the
    whole: those of all processes have to be equal.

    Attributes:
        sums: Checksums of the gathered weights, by name.
        changed: Names of those whose own part has other bits than before.
    """

    def __init__(self, module: nn.Module) -> None:
        self.sums: dict[str, int] = {}
        self.changed: list[str] = []
        self._handles: dict[str, Any] = {}
        if require_record(module).shards == 1:
            return
        self._shards = require_record(module).shards
        self._rank = import_module("torch.distributed").get_rank() % self._shards
        seen: set[int] = set()
        for name, block in [*reversed(gathered_blocks(module).items()), ("", module)]:
            # Those inside of others come first, and are gathered for themselves.
            parts = list(_parts_in(block, name, seen))
            # Behind the hook that gathers.
            hook = partial(self._compare, name, parts)
            self._handles[name] = block.register_forward_pre_hook(hook)

    @property
    def is_due(self) -> bool:
        """Whether a block has not been called yet."""
        return bool(self._handles)

    def _compare(
        self, name: str, parts: list[tuple[str, nn.Module, str, int, int]], *_: Any
    ) -> None:
        handle = self._handles.pop(name, None)
        if handle is None:
            return
        handle.remove()
        for full, owner, leaf, rows, before in parts:
            gathered = owner._parameters[leaf]
            assert gathered is not None
            start = self._rank * -(-len(gathered) // self._shards)
            own = gathered.detach()[start : start + rows]
            if exact_checksum(own) != before:
                self.changed.append(full)
            self.sums[full] = exact_checksum(gathered)

    def stop(self) -> None:
        """Takes away the hooks of blocks that were not called."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


def _parts_in(block: nn.Module, name: str, seen: set[int]) -> Iterable[Any]:
    """Yields name, owner, name inside of it, rows and checksum of each part that a block has."""
    for prefix, owner in block.named_modules():
        for leaf, param in owner._parameters.items():
            if not hasattr(param, "to_local") or id(param) in seen:
                continue
            seen.add(id(param))
            local = local_part(param)
            full = ".".join(filter(None, (name, prefix, leaf)))
            yield full, owner, leaf, len(local), exact_checksum(local)
