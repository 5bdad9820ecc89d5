"""One setting of the form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lightning_peft.arguments import LoRAArguments, QLoRAArguments
from lightning_peft.task_registry import TaskSpec

STRATEGY = "trainer.strategy.init_args."
Kind = Literal[
    "integer",
    "number",
    "switch",
    "choice",
    "several",
    "text",
    "words",
    "numbers",
    "pairs",
    "batches",
]
# What a setting may be for, besides the name of a task, or of the class of its module or data.
_TRAITS: dict[str, Callable[[TaskSpec], bool]] = {
    "all": lambda task: True,
    "rows": lambda task: task.reader is not None,
    "tokens": lambda task: task.reader == "AutoTokenizer",
    "lengths": lambda task: task.reader in ("AutoTokenizer", "AutoProcessor"),
    "chat_template": lambda task: task.chat_template,
    "generation": lambda task: task.generates,
}
# The kind of a setting is that of the first of these among the types of its argument.
_KINDS: tuple[tuple[Any, Kind], ...] = (
    (list[str], "words"),
    (list[int], "numbers"),
    (dict[str, int], "pairs"),
    (bool, "switch"),
    (int, "integer"),
    (float, "number"),
    (str, "text"),
)
_TYPES = get_type_hints(QLoRAArguments)
_LORA, _QLORA = ({one.name: one for one in fields(of)} for of in (LoRAArguments, QLoRAArguments))


@dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        path: Its place in a recipe, as in ``content``.
        kind: What its value is.
        default: The value where a recipe does not have it.
        choices: What a ``"choice"`` can be, and ``"several"`` can hold.
        group: Part of the form.
        ge: Smallest number.
        gt: Number that it must exceed.
        le: Largest number.
        optional: Whether it can be empty: ``null``.
        tasks: The tasks that have it: a trait, or the names of classes of theirs.
        method: ``"qlora"`` if only that has it.
        defaults: Defaults of methods that have another, by name.
    """

    path: str
    kind: Kind
    default: Any = None
    choices: tuple[Any, ...] = ()
    group: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    optional: bool = False
    tasks: str = "all"
    method: str | None = None
    defaults: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Name of its texts: the last word of the path, with the callback's where it is one's."""
        words = self.path.split(".")
        if "callbacks" in words:
            place = words.index("callbacks") + 1
            return "_".join(word for word in words[place:] if word != "init_args").lower()
        return words[-1]

    def is_for(self, task: TaskSpec) -> bool:
        """Whether recipes of ``task`` can have it."""
        if self.tasks in _TRAITS:
            return _TRAITS[self.tasks](task)
        return not {task.class_name, task.data_name}.isdisjoint(self.tasks.split())


def _kind(types: tuple[Any, ...], choices: tuple[Any, ...]) -> Kind:
    return "choice" if choices else next((kind for one, kind in _KINDS if one in types), "text")


def setting(
    path: str,
    default: Any = None,
    choices: tuple[Any, ...] = (),
    *,
    kind: Kind | None = None,
    optional: bool = False,
    **more: Any,
) -> Field:
    """Returns a setting of the kind of its default; one without a default can be empty.

    The classes of the Trainer, the tasks and their data cannot be looked at here, since they import
    torch; a test compares.
    """
    optional = optional or (default is None and not choices)
    kind = kind or _kind((type(default),), choices)
    return Field(path, kind, default, choices, optional=optional, **more)


def strategy_setting(name: str, choices: tuple[Any, ...] = (), **limits: Any) -> Field:
    """Returns the setting of an argument of QLoRA, and of LoRA if both have it.

    Args:
        name: The argument, whose dataclass gives type, default and choices.
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
        _kind(types, choices),
        default,
        choices,
        optional=optional and not choices,
        method=None if lora else "qlora",
        defaults=() if qlora.default == default else (("qlora", qlora.default),),
        **limits,
    )
