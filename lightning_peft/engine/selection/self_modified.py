"""Detection of weights that the model changes in place.

Gemma 3n clamps the coefficients of AltUp in training, RWKV rescales its outputs in evaluation. Such
a layer stays dense and without an adapter: what other code sees of an adapted or quantized weight
is computed, and a change of it would be lost.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

from lightning_peft.engine.layers.mixin import class_key

_CHANGE = re.compile(r"\b((?:\w+\.)+)weight(?:\.data)?\.[a-z]+_\(")


def self_modified_layers(part: nn.Module) -> dict[str, str]:
    """Returns the names of such layers, with the class whose code changes them."""
    found: dict[str, str] = {}
    for name, child in part.named_modules():
        origin: Any = class_key(child)[2]
        for suffix in _changed_by(origin):
            inner = [n for n, _ in child.named_modules() if n == suffix or n.endswith(f".{suffix}")]
            found |= {f"{name}.{n}".lstrip("."): origin.__name__ for n in inner}
    return found


@cache
def _changed_by(cls: Any) -> tuple[str, ...]:
    """Returns the dotted names, below an instance of ``cls``, of layers that its code changes."""
    if cls.__module__.startswith("torch."):
        return ()
    found = []
    for name, function in vars(cls).items():
        # Initialisation is over when adapters are added.
        if not isinstance(function, FunctionType) or "init" in name or name.startswith("reset"):
            continue
        names = function.__code__.co_names
        if "weight" not in names or not any(n.endswith("_") and n[0] != "_" for n in names):
            continue
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            continue
        found += [path.split(".", 1)[1].rstrip(".") for path in _CHANGE.findall(source)]
    return tuple(dict.fromkeys(filter(None, found)))
