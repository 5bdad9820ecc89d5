"""What runs said to the same held-out prompts, at their last validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradio_app.running.reading import rows_of
from gradio_app.running.store import Run

MOST_ROWS = 12


@dataclass(frozen=True)
class Said:
    """What was said to one prompt.

    Attributes:
        prompt: The prompt.
        expected: What the data says to it.
        answers: What each run said; ``None`` for one that was not asked.
    """

    prompt: str
    expected: str
    answers: tuple[str | None, ...]


def side_by_side(runs: Sequence[Run]) -> list[Said]:
    """Returns prompts that more than one run was asked; those of most runs come first."""
    asked: dict[str, str] = {}
    answers: list[dict[str, str]] = []
    for run in runs:
        rows = [row for row in rows_of(run.folder.samples) if isinstance(row.get("step"), int)]
        last = max((row["step"] for row in rows), default=0)
        said = {}
        for row in rows:
            if row["step"] == last and "prompt" in row:
                said[str(row["prompt"])] = str(row.get("generated", ""))
                asked.setdefault(str(row["prompt"]), str(row.get("expected", "")))
        answers.append(said)
    found = [
        Said(prompt, expected, tuple(said.get(prompt) for said in answers))
        for prompt, expected in asked.items()
    ]
    shared = [one for one in found if len(runs) - one.answers.count(None) > 1]
    return sorted(shared, key=lambda one: one.answers.count(None))[:MOST_ROWS]
