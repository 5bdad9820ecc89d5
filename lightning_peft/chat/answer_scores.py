"""Scores of answers: exact match, valid JSON and token overlap."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning_peft.json_equality import equal_texts, parse_json

# Scripts without spaces between words: there, a token is a character.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_TOKENS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


@dataclass(frozen=True)
class AnswerScore:
    """How near one answer is to the expected one."""

    # The same text, or equal JSON. Of white space, line breaks and indentation count, spaces
    # between words and at the ends do not.
    exact: bool
    # None where no JSON object or array is expected.
    valid_json: bool | None
    # F1 of the words and punctuation marks that both have, from 0 to 1; case does not count.
    token_overlap: float


@dataclass(frozen=True)
class ScoreSummary:
    """The scores of several answers: how many match, should be JSON and are; their mean F1."""

    rows: int
    exact: int
    json_rows: int
    valid_json: int
    token_overlap: float


def is_exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected text, or equal JSON; never where nothing is expected."""
    same = _lines(answer) == _lines(expected) or equal_texts(answer, expected)
    return bool(expected.strip()) and same


def _lines(text: str) -> list[tuple[str, list[str]]]:
    """Returns the indentation and the words of each line."""
    lines = text.strip().splitlines()
    return [(line[: len(line) - len(line.lstrip())], line.split()) for line in lines]


def score_answer(answer: str, expected: str) -> AnswerScore:
    """Returns the score of one answer."""
    expects_json = expected.strip()[:1] in ("{", "[") and _is_json(expected)
    return AnswerScore(
        exact=is_exact(answer, expected),
        valid_json=_is_json(answer) if expects_json else None,
        token_overlap=_overlap(answer, expected),
    )


def summarize(scores: Iterable[AnswerScore]) -> ScoreSummary:
    """Returns the summary of scores, of none zeros."""
    known = list(scores)
    json_scores = [score.valid_json for score in known if score.valid_json is not None]
    return ScoreSummary(
        rows=len(known),
        exact=sum(score.exact for score in known),
        json_rows=len(json_scores),
        valid_json=sum(json_scores),
        token_overlap=fmean(score.token_overlap for score in known) if known else 0.0,
    )


def summarize_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, ScoreSummary]:
    """Returns the summaries by model of rows of :func:`comparison.answers`, ``scores`` in them."""
    found: dict[str, list[AnswerScore]] = {}
    for row in rows:
        for name, score in row.get("scores", {}).items():
            found.setdefault(name, []).append(AnswerScore(**score))
    return {name: summarize(scores) for name, scores in found.items()}


def _is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def _overlap(answer: str, expected: str) -> float:
    said, wanted = (Counter(_TOKENS.findall(text.casefold())) for text in (answer, expected))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())
