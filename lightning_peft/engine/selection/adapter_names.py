"""Validation of adapter names."""

from __future__ import annotations

import re

from torch import nn

from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.errors import ConfigError

# Parts of parameter names by which PEFT tells an adapter from what it was added to.
_RESERVED = ("base_layer", "weight", "bias", "original_module", "modules_to_save")
_REFUSED_CHARACTERS = re.compile(r"[^\w \-+=@#]")


def check_adapter_name(name: str) -> None:
    """Refuses names with which parameters or files would mean something else."""
    problem = _problem(name)
    if problem:
        raise ConfigError(
            f"adapter_name={name!r} {problem}. It becomes a part of parameter names and the name "
            "of a folder. Use letters, digits, '_' and '-', for example 'default'."
        )


def _problem(name: str) -> str | None:
    if not isinstance(name, str):
        return f"is of type {type(name).__name__}, not a string"
    if not name or name != name.strip():
        return "is empty, or begins or ends with a space"
    found = _REFUSED_CHARACTERS.search(name)
    if found:
        return f"has {found.group()!r} in it"
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        return "is an attribute of nn.ModuleDict or nn.ParameterDict"
    if name in _RESERVED or "lora_" in name:
        return "is what PEFT calls something else in parameter names"
    return None


def adapter_attributes(layer: nn.Module, method: InPlaceMethod | None) -> list[str]:
    """Returns the attributes by which another library keeps adapters on ``layer``."""
    kind = method.layer_class(layer) if method else None
    names = ("lora_A", *(kind.adapter_layer_names if kind else ()))
    return [name for name in dict.fromkeys(names) if hasattr(layer, name)][:1]
