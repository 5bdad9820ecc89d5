"""One setting of a recipe, as the form has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lightning_peft.task_registry import TaskSpec

Kind = Literal[
    "integer", "number", "switch", "choice", "text", "words", "numbers", "pairs", "batches"
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


@dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        path: Its place in a recipe, as in ``content``.
        group: Part of the form.
        kind: What its value is.
        default: The value where a recipe does not have it.
        choices: What a ``"choice"`` can be.
        ge: Smallest number.
        gt: Number that it must exceed.
        le: Largest number.
        optional: Whether it can be empty: ``null``.
        tasks: The tasks that have it: a trait, or the name of a class of theirs.
        method: ``"qlora"`` if only that has it.
        defaults: Defaults of methods that have another, by name.
    """

    path: str
    group: str
    kind: Kind
    default: Any = None
    choices: tuple[Any, ...] = ()
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
        return self.tasks in (task.class_name, task.data_name)


_KINDS: tuple[tuple[type, Kind], ...] = (
    (bool, "switch"),
    (int, "integer"),
    (float, "number"),
    (str, "text"),
)


def setting(
    path: str,
    group: str,
    default: Any = None,
    choices: tuple[Any, ...] = (),
    *,
    kind: Kind | None = None,
    optional: bool = False,
    **more: Any,
) -> Field:
    """Returns a setting of the kind of its default; one without a default can be empty.

    Args:
        path: Its place in a recipe.
        group: Part of the form.
        default: The value where a recipe does not have it.
        choices: Values to choose from.
        kind: What its value is, where the default does not show it.
        optional: Whether it can be empty although it has a default.
        **more: Other attributes of :class:`Field`.
    """
    known: Kind = next((one for cls, one in _KINDS if isinstance(default, cls)), "text")
    chosen: Kind = "choice" if choices else kind or known
    optional = optional or (default is None and not choices)
    return Field(path, group, chosen, default, choices, optional=optional, **more)
