"""Writes the page with every method of PEFT, from PEFT's list and the registry of methods."""

from __future__ import annotations

from pathlib import Path

from peft import PeftType

from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.engine.methods.lora_config import INITS, REFUSED_FIELDS, REFUSED_INITS
from lightning_peft.engine.methods.registry import METHODS, REASONS

PAGE = Path(__file__).with_name("peft-methods.md")
_HEAD = """\
# Methods of PEFT

Every method that the installed PEFT lists, made from PEFT's list and this package's registry. The
name is what `peft_type` takes in `peft_config`. *In place* means on the layers themselves, without
a wrapper; *PEFT's layers* are PEFT's own wrappers, with float32 adapters. Both train, are saved and
resumed, and PEFT reads their folders; tests compare each with `peft.get_peft_model`. Exceptions for
single layers and settings are [here](which-modules.md#methods-besides-lora).

| method | served | over a 4-bit base | merged | remarks |
| --- | --- | --- | --- | --- |
"""
_INITS = """
## Initialisations of LoRA

`init_lora_weights` is `True`, `False` or one of {served}.
Refused: {refused}. PEFT freezes one of its factors in a variant of its layers.

## Fields of LoraConfig that are refused

{fields}.
They change the model around the layers, or work through PEFT's model class only.
"""


def text() -> str:
    """Returns the page."""
    rows = "".join(f"| {' | '.join(row(str(kind.value)))} |\n" for kind in sorted(PeftType))
    return (
        (_HEAD + rows).rstrip()
        + "\n"
        + _INITS.format(
            served=_names(INITS),
            refused=_names(REFUSED_INITS),
            fields=_names(name.lstrip("_") for name in REFUSED_FIELDS),
        )
    )


def row(kind: str) -> tuple[str, ...]:
    """Returns the cells of the row of a `peft_type`."""
    method = METHODS.get(kind)
    if method is None:
        return f"`{kind}`", "refused", "", "", REASONS[kind]
    where = "in place" if isinstance(method, InPlaceMethod) else "PEFT's layers"
    base = "on layers that stay dense" if method.dense_only else "yes"
    targets = f"name {method.targets}" if method.targets else ""
    return f"`{kind}`", where, base, "yes", "; ".join(filter(None, (method.remark, targets)))


def _names(names: object) -> str:
    return ", ".join(f"`{name}`" for name in names)  # type: ignore[attr-defined]
