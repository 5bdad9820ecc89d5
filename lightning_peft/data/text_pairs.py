"""Parsing of text pairs: anchors with positives, or pairs with a score."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning_peft.data.samples import Sample, collect, required_texts, row_problem, shortened
from lightning_peft.errors import ConfigError

# Columns for one negative each, as sentence-transformers writes mined ones.
NUMBERED = tuple(f"negative_{number}" for number in range(1, 11))


def parse_anchor(fields: Mapping[str, Any]) -> Sample:
    """Returns an anchor, its positive, and what else the row names as not belonging to it."""
    anchor, positive, negatives = collect(
        lambda: required_texts(fields, ["anchor"])[0],
        lambda: required_texts(fields, ["positive"])[0],
        lambda: _negatives(fields),
    )
    wrong = [
        f"has its {name} among its negatives: {shortened(text)}"
        for name, text in (("positive", positive), ("anchor", anchor))
        if text.strip() in {negative.strip() for negative in negatives}
    ]
    if wrong:
        raise row_problem("negatives", "; ".join(wrong))
    return Sample(text=anchor, text_pair=positive, negatives=negatives)


def unread_beside_anchor(
    name: str, value: Any, scores: Collection[str]
) -> list[tuple[str, str]] | None:
    """Returns the problems of a column that no field reads, next to an anchor and its positive.

    Without ``scores``, a pair that does not belong together would be learnt as one that does.
    """
    if name in scores:
        why = (
            "every positive is learnt as belonging to its anchor. Map both texts, with "
            'columns={"text_a": ..., "text_b": ...}, or name the column in ignored_keys='
        )
        return [("score", f"has {name}={shortened(value)}, and {why}")]
    if "negative" in name.lower():
        known = f"negative, negatives and {NUMBERED[0]} to {NUMBERED[-1]}"
        return [("negatives", f"has the column {name!r}, and {known} are read")]
    return None


def refuse_two_texts(
    rows: Sequence[Mapping[str, Any]], fields: Mapping[str, Sequence[str]]
) -> None:
    """Refuses rows with two columns for a text, unless one has the field's own name."""
    for ours, names in fields.items():
        for row in rows:
            there = [name for name in names if row.get(name) is not None]
            if len(there) > 1 and ours not in there:
                raise ConfigError(
                    f"A row has {' and '.join(map(repr, there))}, and each of them may be its "
                    f'{ours}. Say which one is, such as columns={{"{ours}": "{there[0]}"}}.'
                )


def _negatives(fields: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name in ("negative", "negatives", *NUMBERED):
        value = fields.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise row_problem("negatives", f"has {shortened(text)} as {name}, not text")
        found += texts
    return list(dict.fromkeys(found))


def parse_scored(fields: Mapping[str, Any]) -> Sample:
    """Returns two texts and the score of the pair."""
    first, second, score = collect(
        lambda: required_texts(fields, ["text_a"])[0],
        lambda: required_texts(fields, ["text_b"])[0],
        lambda: _score(fields.get("score")),
    )
    return Sample(text=first, text_pair=second, score=score)


def _score(value: Any) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise row_problem("missing", "has no score")
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise row_problem("score", f"has {shortened(value)} as score, which is not a number")
    return score
