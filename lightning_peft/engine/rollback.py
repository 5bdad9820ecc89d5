"""Rollback of failed changes to a module."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_peft.engine.layers.expert_weights import ExpertWeight
from lightning_peft.engine.record import record_of


@contextmanager
def restored_on_error(
    modules: Iterable[nn.Module], rewritten: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Puts modules back if the body fails: classes, attributes, submodules, records, gradients.

    Tensors that the body exchanges, such as weights that it quantizes, are kept until it ends.

    Args:
        modules: The modules that the body changes, with all below them.
        rewritten: Tensors whose values the body may change. Until it ends, their values are kept
            on the CPU: as much memory again.
    """
    children = {id(child): child for child in _with_owners(modules)}
    states = [_State(child) for child in children.values()]
    values = [(x, x.data, x.data.to("cpu", copy=True)) for x in rewritten if not x.is_meta]
    try:
        yield
    except BaseException:
        for state in states:
            state.restore()
        for tensor, data, value in values:
            data.copy_(value)
            tensor.data = data
        raise


def _with_owners(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """All modules in ``modules``, and those whose parameters they change."""
    for child in (child for module in modules for child in module.modules()):
        yield child
        if isinstance(child, ExpertWeight):
            yield child.owner


def floating_tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Returns parameters, buffers and other tensors of modules that hold numbers, not codes."""
    found: dict[int, Tensor] = {}
    for child in _with_owners(modules):
        held = (*child._parameters.values(), *child._buffers.values(), *vars(child).values())
        found |= {id(x): x for x in held if isinstance(x, Tensor) and x.is_floating_point()}
    return list(found.values())


class _State:
    """One module as it is now; its submodules have states of their own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.attributes = dict(module.__dict__)
        # Put back into the same containers: handles of hooks know them.
        self.containers = [
            (value, copy.copy(value))
            for value in self.attributes.values()
            # Not of subclasses, which may refuse to be changed: outputs of transformers do.
            if type(value) in (dict, OrderedDict, list, set)
        ]
        held = [*module._parameters.values(), *module._buffers.values()]
        self.tensors = [(x, x.data, x.requires_grad) for x in held if x is not None]
        record = record_of(module)
        self.record = None if record is None else (record, _copied(record))

    def restore(self) -> None:
        """Puts the module back."""
        self.module.__class__ = self.kind
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for container, before in self.containers:
            container.clear()
            fill: Any = container.extend if isinstance(container, list) else container.update
            fill(before)
        for tensor, data, requires_grad in self.tensors:
            if tensor.data.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype:
                tensor.data = data
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
        if self.record is not None:
            record, copied = self.record
            vars(record).update(vars(copied))


def _copied(value: Any) -> Any:
    """Returns a copy of a record, down to its containers; tensors and configs are shared."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: _copied(v) for k, v in items.items()})
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return copy.copy(value) if isinstance(value, (list, set)) else value
