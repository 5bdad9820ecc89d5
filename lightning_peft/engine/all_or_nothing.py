"""Changing several layers so that either all of them change or none does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def all_or_nothing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Puts ``layers`` back, bit for bit, if the body fails.

    Values are kept on the CPU while the body runs: as much memory again as the weights take.

    Args:
        layers: The layers that the body changes. Their classes, attributes and submodules are put
            back too.
    """
    before = [_Before(module) for layer in layers for module in layer.modules()]
    try:
        yield
    except BaseException:
        for state in before:
            state.restore()
        raise


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Returns ``function`` for calls under autocast too, which would round its products."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return call


class _Before:
    """One module as it is now; its submodules have states of their own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.attributes = {name: _copied(value) for name, value in module.__dict__.items()}
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        # Codes of quantized weights are replaced, never written to.
        self.values = [
            (x, x.data, x.data.to("cpu", copy=True))
            for x in held
            if isinstance(x, Tensor) and x.is_floating_point() and not x.is_meta
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the module back."""
        self.module.__class__ = self.kind
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for tensor, data, value in self.values:
            data.copy_(value)
            tensor.data = data


def _copied(value: Any) -> Any:
    # Parameters, submodules and names of merged adapters are in such containers.
    return value.copy() if type(value) in (dict, list, set) else value
