"""Settings of the strategy: type, default and choices are those of its arguments' dataclasses."""

from __future__ import annotations

from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gradio_app.recipe.setting import Field, Kind
from lightning_peft.arguments import LoRAArguments, QLoRAArguments

STRATEGY = "trainer.strategy.init_args."
_TYPES = get_type_hints(QLoRAArguments)
_LORA, _QLORA = ({one.name: one for one in fields(of)} for of in (LoRAArguments, QLoRAArguments))
# The first that is among the types of an argument.
_KINDS: tuple[tuple[Any, Kind], ...] = (
    (list[str], "words"),
    (list[int], "numbers"),
    (dict[str, int], "pairs"),
    (bool, "switch"),
    (int, "integer"),
    (float, "number"),
)


def strategy_field(name: str, group: str, choices: tuple[Any, ...] = (), **limits: Any) -> Field:
    """Returns the setting of an argument of QLoRA, and of LoRA if both have it.

    Args:
        name: The argument.
        group: Part of the form.
        choices: Values to choose from, where the type allows more than a form can offer.
        **limits: ``ge``, ``gt`` and ``le``.
    """
    qlora, lora = _QLORA[name], _LORA.get(name)
    default = (lora or qlora).default
    types = get_args(_TYPES[name]) if get_origin(_TYPES[name]) is not Literal else ()
    types = types or (_TYPES[name],)
    optional = NoneType in types
    if not choices:
        choices = tuple(v for one in types if get_origin(one) is Literal for v in get_args(one))
        choices = (None, *choices) if choices and optional else choices
    return Field(
        STRATEGY + name,
        group,
        "choice" if choices else next(kind for one, kind in _KINDS if one in types),
        default,
        choices,
        optional=optional and not choices,
        method=None if lora else "qlora",
        defaults=() if qlora.default == default else (("qlora", qlora.default),),
        **limits,
    )
