"""Sampling settings and their validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and what ends an answer.

    A generation config in the base's folder does not count, but for its end tokens.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        temperature: 0 always takes the likeliest token.
        top_p: Share of the probability from which is drawn.
        top_k: Likeliest tokens from which is drawn; 0 for all.
        repetition_penalty: What the scores of tokens are divided by that are in the prompt or the
            answer already (multiplied, where negative); 1 for nothing.
        stop: Texts before which an answer ends.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Returns the arguments of ``generate`` but for the length."""
        drawing = self.temperature > 0
        return {
            "do_sample": drawing,
            "temperature": self.temperature if drawing else None,
            "top_p": self.top_p if drawing else None,
            "top_k": self.top_k or None if drawing else None,
            "repetition_penalty": self.repetition_penalty,
        }


# Names, in the order of their arguments.
NAMES = tuple(one.name for one in fields(Sampling))
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": ("a whole number, 1 at least", lambda n: is_whole(n) and n >= 1),
    "temperature": ("0 or more", lambda n: _number(n) and 0 <= n < float("inf")),
    "top_p": ("more than 0, and at most 1", lambda n: _number(n) and 0 < n <= 1),
    "top_k": ("a whole number, 0 at least", lambda n: is_whole(n) and n >= 0),
    "repetition_penalty": ("more than 0", lambda n: _number(n) and 0 < n < float("inf")),
    "stop": ("a list of texts that are not empty", lambda texts: _texts(texts)),
}


def broken_rules(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns the rules that values of :class:`Sampling` break, by name."""
    known = {name: rule for name, rule in _RULES.items() if name in values}
    return {name: rule for name, (rule, holds) in known.items() if not holds(values[name])}


def is_whole(value: Any) -> bool:
    """Whether a value of JSON is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(x, str) and x for x in value)
