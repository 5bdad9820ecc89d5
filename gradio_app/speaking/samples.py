"""Questions that a model was not trained on, with what would be a good answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradio_app.errors import Refused
from gradio_app.running.reading import json_object, rows_of
from gradio_app.running.store import Run
from gradio_app.speaking.asking import LONGEST_TEXT

MOST = 3
Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class HeldOut:
    """A row of the validation data.

    Attributes:
        prompt: The question; where turns are not known, the text that the model was given.
        reference: The answer in the data.
        turns: Role and text of the turns before the question; ``None`` where they are not known.
    """

    prompt: str
    reference: str
    turns: Turns | None = None

    @property
    def system(self) -> str:
        """Its system turn; empty if it has none."""
        first = self.turns[0] if self.turns else ("", "")
        return first[1] if first[0] == "system" else ""

    @property
    def earlier(self) -> list[dict[str, str]]:
        """The turns between system turn and question."""
        return [
            {"role": role, "content": text} for role, text in self.turns or () if role != "system"
        ]


@dataclass(frozen=True)
class SystemPrompt:
    """The system prompt that most rows of the training data have.

    Attributes:
        text: The prompt; empty if no row has one.
        rows: How many rows have this one.
        of: How many rows there are.
    """

    text: str = ""
    rows: int = 0
    of: int = 0


def system_prompt(run: Run) -> SystemPrompt:
    """Returns the system prompt of a run's data."""
    found = json_object(run.folder.prompts).get("system")
    known = found if isinstance(found, dict) else {}
    text, rows, of = known.get("text"), known.get("rows"), known.get("of")
    if not isinstance(text, str) or not isinstance(rows, int) or not isinstance(of, int):
        return SystemPrompt()
    return SystemPrompt(text, rows, of) if len(text) <= LONGEST_TEXT else SystemPrompt(of=of)


def held_out(run: Run) -> list[HeldOut]:
    """Returns up to three validation rows, of older runs those that it has shown samples of."""
    known = json_object(run.folder.prompts).get("held_out")
    rows = [_row(turns) for turns in known] if isinstance(known, list) else []
    found = {(row.turns, row.prompt): row for row in rows if row is not None}
    return list(found.values())[:MOST] or _sampled(run)


def _row(turns: Any) -> HeldOut | None:
    """Returns a row whose turns are known, if it can be asked."""
    try:
        said = tuple((str(turn["role"]), str(turn["content"])) for turn in turns)
    except (KeyError, TypeError):
        return None
    if [role for role, _ in said[-2:]] != ["user", "assistant"]:
        return None
    if any(len(text) > LONGEST_TEXT for _, text in said):
        return None
    return HeldOut(said[-2][1].strip(), said[-1][1], said[:-2])


def _sampled(run: Run) -> list[HeldOut]:
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
    """Returns the question of a row.

    Args:
        row: A row. Where its turns are not known, its prompt is the text that the model was given,
            with the template in it.
        around: What the template puts before and after a first question.

    Raises:
        Refused: If more than a question is in that text, such as a system turn.
    """
    if row.turns is not None:
        return row.prompt
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
    """Returns the prompts as they are offered.

    Of texts with the template in them, the lines that all of them begin and end with are left out.
    """
    texts = [row.prompt.strip() for row in rows]
    if len(texts) < 2 or any(row.turns is not None for row in rows):
        return texts
    before = os.path.commonprefix(texts).rpartition("\n")
    after = os.path.commonprefix([text[::-1] for text in texts])[::-1].partition("\n")
    first, last = len("".join(before[:2])), len("".join(after[1:]))
    return [text[first : len(text) - last].strip() or text for text in texts]
