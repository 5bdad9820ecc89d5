"""One setting of a recipe, as the form has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "integer", "number", "switch", "choice", "text", "words", "numbers", "pairs", "batches"
]
LANGUAGE_TASKS = ("sft", "dpo", "orpo", "reward")
TOKEN_TASKS = (
    *LANGUAGE_TASKS,
    "text-classification",
    "token-classification",
    "summarization",
    "translation",
)
_SERIES = "time-series"
ROW_TASKS = (*TOKEN_TASKS, "speech-recognition", "image-classification")
ALL_TASKS = (*ROW_TASKS, _SERIES)


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
        tasks: Names of the tasks that have it.
        method: ``"qlora"`` if only that has it.
        defaults: Defaults of methods or tasks that have another, by name.
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
    tasks: tuple[str, ...] = ALL_TASKS
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
