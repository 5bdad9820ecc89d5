"""Questions that a model was not trained on, with what would be a good answer."""

from __future__ import annotations

from dataclasses import dataclass

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
        if isinstance(prompt, str) and isinstance(reference, str) and prompt not in found:
            if prompt.strip() and len(prompt) <= LONGEST_TEXT:
                found[prompt] = HeldOut(prompt, reference)
        if len(found) == MOST:
            break
    return list(found.values())
