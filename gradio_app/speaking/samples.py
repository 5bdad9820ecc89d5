"""Questions that a model was not trained on, with what would be a good answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from gradio_app.errors import Refused
from gradio_app.running.reading import rows_of
from gradio_app.running.store import Run
from gradio_app.speaking.asking import LONGEST_TEXT

MOST = 3


@dataclass(frozen=True)
class HeldOut:
    """A row of the validation data.

    Attributes:
        prompt: The question.
        reference: The answer in the data.
    """

    prompt: str
    reference: str


def held_out(run: Run) -> list[HeldOut]:
    """Returns up to three validation rows that the run has shown samples of."""
    found: dict[str, HeldOut] = {}
    for row in rows_of(run.folder.samples):
        prompt, reference = row.get("prompt"), row.get("expected")
        if not isinstance(prompt, str) or not isinstance(reference, str):
            continue
        if prompt.strip() and len(prompt) <= LONGEST_TEXT:
            found.setdefault(prompt, HeldOut(prompt, reference))
        if len(found) == MOST:
            break
    return list(found.values())


def question_of(row: HeldOut, around: Sequence[str] | None) -> str:
    """Returns the question in the text that a model was given.

    Args:
        row: A row, whose prompt is that text: the template is in it.
        around: What the template puts before and after a first question.

    Raises:
        Refused: If more than a question is in it, such as a system turn.
    """
    if around is None:
        raise Refused("trying.refused_row")
    before, after = around
    text = row.prompt.strip()
    before, after = before.lstrip(), after.rstrip()
    enough = len(text) > len(before) + len(after)
    if not (enough and text.startswith(before) and text.endswith(after)):
        raise Refused("trying.refused_row")
    return text[len(before) : len(text) - len(after)].strip()


def labels(rows: Sequence[HeldOut]) -> list[str]:
    """Returns the prompts without the lines that all of them begin and end with, to be shown."""
    texts = [row.prompt.strip() for row in rows]
    if len(texts) < 2:
        return texts
    before = os.path.commonprefix(texts).rpartition("\n")
    after = os.path.commonprefix([text[::-1] for text in texts])[::-1].partition("\n")
    first, last = len("".join(before[:2])), len("".join(after[1:]))
    return [text[first : len(text) - last].strip() or text for text in texts]
