"""What runs said to the same held-out prompts, at their last validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradio_app.runs.files import read_rows
from gradio_app.runs.types import Run

MAX_ROWS = 12


@dataclass(frozen=True)
class AnswerComparison:
    """The answer of each run to one prompt, ``None`` for a run without it, and the expected one."""

    prompt: str
    expected: str
    answers: tuple[str | None, ...]


def compare_answers(runs: Sequence[Run]) -> list[AnswerComparison]:
    """Returns the prompts that more than one run has; those of most runs come first."""
    asked: dict[str, str] = {}
    answers: list[dict[str, str]] = []
    for run in runs:
        rows = [row for row in read_rows(run.folder.samples) if isinstance(row.get("step"), int)]
        last = max((row["step"] for row in rows), default=0)
        said = {}
        for row in rows:
            if row["step"] == last and "prompt" in row:
                said[str(row["prompt"])] = str(row.get("generated", ""))
                asked.setdefault(str(row["prompt"]), str(row.get("expected", "")))
        answers.append(said)
    found = [
        AnswerComparison(prompt, expected, tuple(said.get(prompt) for said in answers))
        for prompt, expected in asked.items()
    ]
    shared = [one for one in found if len(runs) - one.answers.count(None) > 1]
    return sorted(shared, key=lambda one: one.answers.count(None))[:MAX_ROWS]
