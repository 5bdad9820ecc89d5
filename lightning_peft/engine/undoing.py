"""Putting a module back as it was where adding or loading an adapter fails."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine.record import Record, record_of


@contextmanager
def undone_on_error(module: nn.Module, rewritten: Iterable[Tensor] = ()) -> Iterator[None]:
    """Puts ``module`` back if the body fails: classes, attributes, submodules, record, gradients.

    Weights that the body exchanges, such as those it quantizes, are kept until it ends. Values are
    not copied, since adding an adapter writes into few tensors.

    Args:
        module: The module that the body changes.
        rewritten: Tensors whose values the body may change; they are copied and put back.
    """
    states = [_State(child) for child in module.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in rewritten if not tensor.is_meta]
    record = record_of(module)
    kept = None if record is None else _record_as_it_is(record)
    try:
        yield
    except BaseException:
        for state in states:
            state.restore()
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        if record is not None and kept is not None:
            record.__dict__.update(kept.__dict__)
        raise


class _State:
    """One module as it is now; its submodules have states of their own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.attributes = dict(module.__dict__)
        # Put back into the same containers: handles of hooks know them.
        self.containers = [
            (value, copy.copy(value))
            for value in self.attributes.values()
            if isinstance(value, (dict, list, set))
        ]
        held = [*module._parameters.values(), *module._buffers.values()]
        self.tensors = [(x, x.data, x.requires_grad) for x in held if x is not None]

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


def _record_as_it_is(record: Record) -> Record:
    parts = {name: _copied(part) for name, part in record.parts.items()}
    return dataclasses.replace(record, parts=parts, momentum_copies=list(record.momentum_copies))


def _copied(part: Any) -> Any:
    changed = {
        item.name: copy.copy(value)
        for item in dataclasses.fields(part)
        if isinstance(value := getattr(part, item.name), (dict, list, set))
    }
    return dataclasses.replace(part, **changed)
