"""The HTML of what a model says to the same rows while it learns. All of it is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from gradio_app.chat.prompts import HeldOutPrompt
from gradio_app.pages.templating import render
from gradio_app.texts import Texts

MAX_STEPS = 4
MAX_PROMPTS = 12
_MAX_CELL = 400
Row = Mapping[str, Any]


def samples(rows: Sequence[Row], known: Sequence[HeldOutPrompt], t: Texts) -> str:
    """Returns the model's answers to the same prompts at different steps.

    Args:
        rows: What the run has written.
        known: Validation rows whose turns are known.
        t: Texts.
    """
    said: dict[tuple[int, int], Row] = {}
    for row in rows:
        if isinstance(row.get("step"), int) and isinstance(row.get("sample"), int):
            said[row["step"], row["sample"]] = row
    if not said:
        return f'<p class="note">{t("run.samples_empty")}</p>'
    steps = _select_steps(sorted({step for step, _ in said}))
    places = sorted({place for _, place in said})[:MAX_PROMPTS]
    columns = [(t("run.prompt"), ""), (t("run.expected"), "")]
    for step in steps:
        found = [said[step, place] for place in places if (step, place) in said]
        right = t("run.samples_right", n=sum(map(_is_correct, found)), of=len(found))
        columns.append(
            (t("run.after_step", step=step) if step else t("run.before_training"), right)
        )
    table = [_row(place, steps, said, known) for place in places]
    return render("samples.samples", t, columns=columns, rows=table)


def _row(
    place: int,
    steps: Sequence[int],
    said: Mapping[tuple[int, int], Row],
    known: Sequence[HeldOutPrompt],
) -> dict[str, Any]:
    first = next(row for (_, sample), row in said.items() if sample == place)
    prompt, expected = str(first.get("prompt", "")), str(first.get("expected", ""))
    answers = [_answer(said.get((step, place))) for step in steps]
    return {"turns": _turns(prompt, expected, known), "cells": [_shorten(expected), *answers]}


def _turns(
    prompt: str, expected: str, known: Sequence[HeldOutPrompt]
) -> list[tuple[str | None, str]]:
    """Returns roles and texts of a prompt where they are known, else its text without a role."""
    for row in known:
        if (
            row.turns is not None
            and row.reference.strip() == expected.strip()
            and row.prompt in prompt
        ):
            turns = [*row.turns, ("user", row.prompt)]
            return [(role, _shorten(text)) for role, text in turns]
    return [(None, _shorten(prompt))]


def _is_correct(row: Row) -> bool:
    said, expected = (str(row.get(name, "")).split() for name in ("generated", "expected"))
    return bool(expected) and said == expected


def _answer(row: Row | None) -> dict[str, Any] | None:
    """Returns an answer by its words, and which of them the expected one does not have."""
    if row is None:
        return None
    correct = _is_correct(row)
    text, expected = str(row.get("generated", "")).strip(), str(row.get("expected", ""))
    compared = not correct and len(text) <= _MAX_CELL
    words = _differences(text, expected) if compared else [(_shorten(text), False)]
    return {"words": words, "correct": correct, "cut": row.get("cut") is True and not correct}


def _differences(text: str, expected: str) -> list[tuple[str, bool]]:
    words, wanted = text.split(" "), expected.strip().split(" ")
    blocks = SequenceMatcher(None, words, wanted, autojunk=False).get_matching_blocks()
    same = {block.a + place for block in blocks for place in range(block.size)}
    # Where nothing is shared, marks would say nothing.
    if not same:
        return [(text, False)]
    return [(word, place not in same and bool(word.strip())) for place, word in enumerate(words)]


def _shorten(text: object) -> str:
    words = str(text).strip()
    return words if len(words) <= _MAX_CELL else words[:_MAX_CELL] + "\u2026"


def _select_steps(steps: list[int]) -> list[int]:
    """Returns the first step, the last one, and those evenly between."""
    if len(steps) <= MAX_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(last * place / (MAX_STEPS - 1))] for place in range(MAX_STEPS)]
