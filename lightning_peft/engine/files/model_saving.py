"""``save_pretrained`` of models with adapters in place, which would lose them without an error."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from lightning_peft.errors import LifecycleError

# Models of others may have a method of that name that does it well.
_LIBRARIES = ("transformers", "diffusers", "peft", "huggingface_hub")


def refuse_save_pretrained(module: nn.Module, parts: list[nn.Module]) -> None:
    """Makes ``save_pretrained`` of the models around or inside adapted parts raise.

    transformers and diffusers write the adapters under names that ``from_pretrained`` passes over,
    and PEFT's wrapper writes a folder without tensors.
    """
    for model in module.modules():
        method = getattr(type(model), "save_pretrained", None)
        if getattr(method, "__module__", "").partition(".")[0] in _LIBRARIES:
            inside = {id(child) for child in model.modules()}
            if any(id(part) in inside or model in part.modules() for part in parts):
                vars(model)["save_pretrained"] = _save_pretrained


def allow_save_pretrained(module: nn.Module) -> None:
    """Undoes :func:`refuse_save_pretrained`."""
    for model in module.modules():
        if vars(model).get("save_pretrained") is _save_pretrained:
            del vars(model)["save_pretrained"]


def _save_pretrained(*_: Any, **__: Any) -> NoReturn:
    raise LifecycleError(
        "save_pretrained of a model with adapters: what it writes would load without them. "
        "lightning_peft.save_adapter(module, folder) writes them in PEFT's format, where module is "
        "the one that the Trainer trains, or that lightning_peft.inject was given. For the whole "
        "model, merge(module) and unload(module) first."
    )
