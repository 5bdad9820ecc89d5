"""Held-out prompts with their expected answers."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from gradio_app.chat.command import sees_images
from gradio_app.chat.request import MAX_TEXT, user_turn
from gradio_app.errors import UserError
from gradio_app.runs.files import read_json_object, read_rows
from gradio_app.runs.types import Run
from lightning_peft.compat.gradio import served_folder

# Questions that are offered, and rows that are scored.
MAX_PROMPTS, MAX_SCORED = 3, 100
# Role, text, and images in base64.
Turns = tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class HeldOutPrompt:
    """A row of the validation data: question, answer, the turns before, and the images shown.

    Where turns are not known, they are ``None`` and the prompt is the text that the model was
    given.
    """

    prompt: str
    reference: str
    turns: Turns | None = None
    images: tuple[str, ...] = ()

    @property
    def system(self) -> str:
        """Its system turn; empty if it has none."""
        first = self.turns[0] if self.turns else ("", "", ())
        return first[1] if first[0] == "system" else ""

    @property
    def earlier(self) -> list[dict[str, Any]]:
        """The turns between system turn and question, with their images in base64."""
        return [
            {**user_turn(text, images), "role": role}
            for role, text, images in self.turns or ()
            if role != "system"
        ]


@dataclass(frozen=True)
class SystemPrompt:
    """The system prompt that most rows of the training data have: ``rows`` ``of`` all."""

    text: str = ""
    rows: int = 0
    of: int = 0


def system_prompt(run: Run) -> SystemPrompt:
    """Returns the system prompt of a run's data."""
    known = read_json_object(run.folder.prompts, "system")
    text, rows, of = known.get("text"), known.get("rows"), known.get("of")
    if not isinstance(text, str) or not isinstance(rows, int) or not isinstance(of, int):
        return SystemPrompt()
    return SystemPrompt(text, rows, of) if len(text) <= MAX_TEXT else SystemPrompt(of=of)


def held_out_prompts(run: Run, most: int = MAX_PROMPTS) -> list[HeldOutPrompt]:
    """Returns up to ``most`` validation rows, of older runs those that it has shown samples of."""
    known = read_json_object(run.folder.prompts).get("held_out")
    rows = [_row(turns) for turns in known] if isinstance(known, list) else []
    found = dict.fromkeys(row for row in rows if row is not None)
    # In the samples of a model that sees, images are words.
    return list(found)[:most] or ([] if sees_images(run) else _sampled(run))


def scored_rows(run: Run, most: int = MAX_SCORED) -> list[dict[str, Any]]:
    """Returns the validation rows whose turns are known, as ``chat --serve`` scores them."""
    rows = [row for row in held_out_prompts(run, most) if row.turns is not None]
    opening = [[{"role": "system", "content": row.system}] if row.system else [] for row in rows]
    return [
        {
            "messages": [*first, *row.earlier, user_turn(row.prompt, row.images)],
            "reference": row.reference,
        }
        for first, row in zip(opening, rows, strict=True)
    ]


def _row(turns: Any) -> HeldOutPrompt | None:
    """Returns a row whose turns are known, if it ends in a question and its answer.

    Of older runs, answers may be empty: those that were calls of tools.
    """
    try:
        said = tuple(
            (str(turn["role"]), str(turn["content"]), tuple(map(str, turn.get("images", ()))))
            for turn in turns
        )
    except (AttributeError, KeyError, TypeError):
        return None
    roles, texts = [role for role, _, _ in said], [text for _, text, _ in said]
    if roles[-2:] != ["user", "assistant"] or any(len(text) > MAX_TEXT for text in texts):
        return None
    # An image may be the whole question.
    if not (texts[-2].strip() or said[-2][2]) or not texts[-1].strip():
        return None
    return HeldOutPrompt(texts[-2], texts[-1], said[:-2], said[-2][2])


@cache
def _image_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=served_folder())


def image_file(text: str) -> str:
    """Returns the path of a file with an image of a row, which is in base64.

    Gradio shows files alone. It is deleted with the process.
    """
    content = base64.b64decode(text)
    kind = Image.open(BytesIO(content)).format or "png"
    name = f"{hashlib.sha256(content).hexdigest()[:32]}.{kind.lower()}"
    path = Path(_image_folder().name) / name
    if not path.exists():
        path.write_bytes(content)
    return str(path)


def _sampled(run: Run) -> list[HeldOutPrompt]:
    found: dict[str, HeldOutPrompt] = {}
    for row in read_rows(run.folder.samples):
        prompt, reference = row.get("prompt"), row.get("expected")
        if not isinstance(prompt, str) or not isinstance(reference, str):
            continue
        if prompt.strip() and len(prompt) <= MAX_TEXT:
            found.setdefault(prompt, HeldOutPrompt(prompt, reference))
        if len(found) == MAX_PROMPTS:
            break
    return list(found.values())


def extract_question(row: HeldOutPrompt, around: Sequence[str] | None) -> str:
    """Returns the question of a row.

    Where its turns are not known, its prompt is the text that the model was given, with ``around``
    of the template before and after. Raises UserError if more than a question is in that text.
    """
    if row.turns is not None:
        # With its white space, as in training.
        return row.prompt
    if around is None:
        raise UserError("playground.refused_row")
    before, after = around
    text = row.prompt.strip()
    before, after = before.lstrip(), after.rstrip()
    enough = len(text) > len(before) + len(after)
    if not (enough and text.startswith(before) and text.endswith(after)):
        raise UserError("playground.refused_row")
    return text[len(before) : len(text) - len(after)].strip()


def labels(rows: Sequence[HeldOutPrompt]) -> list[str]:
    """Returns the prompts as they are offered; that of an image alone is empty.

    Of texts with the template in them, the lines that all of them begin and end with are left out.
    """
    texts = [row.prompt.strip() for row in rows]
    if len(texts) < 2 or any(row.turns is not None for row in rows):
        return texts
    before = os.path.commonprefix(texts).rpartition("\n")
    after = os.path.commonprefix([text[::-1] for text in texts])[::-1].partition("\n")
    first, last = len("".join(before[:2])), len("".join(after[1:]))
    return [text[first : len(text) - last].strip() or text for text in texts]
