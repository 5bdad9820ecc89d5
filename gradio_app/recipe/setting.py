"""One setting of a recipe, as the form has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "integer", "number", "switch", "choice", "text", "words", "numbers", "pairs", "batches"
]
LANGUAGE = ("sft", "dpo", "orpo", "reward")
TOKENS = (
    *LANGUAGE,
    "text-classification",
    "token-classification",
    "summarization",
    "translation",
)
_SERIES = "time-series"
ROWS = (*TOKENS, "speech-recognition", "image-classification")
ALL = (*ROWS, _SERIES)


@dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        path: Its place in a recipe, as in ``content``.
        group: Part of the form.
        kind: What its value is.
        default: The value where a recipe does not have it.
        choices: What a ``"choice"`` can be.
        least: Smallest number.
        most: Largest number.
        above: Whether ``least`` itself is too small.
        optional: Whether it can be empty: ``null``.
        tasks: Names of the tasks that have it.
        method: ``"qlora"`` if only that has it.
        others: Defaults of methods or tasks that have another, by name.
    """

    path: str
    group: str
    kind: Kind
    default: Any = None
    choices: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None
    above: bool = False
    optional: bool = False
    tasks: tuple[str, ...] = ALL
    method: str | None = None
    others: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Name of its texts: the last word of the path, with the callback's where it is one's."""
        words = self.path.split(".")
        if "callbacks" in words:
            place = words.index("callbacks") + 1
            return "_".join(word for word in words[place:] if word != "init_args").lower()
        return words[-1]
