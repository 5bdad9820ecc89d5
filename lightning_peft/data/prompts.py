"""Initial prompts of a chat: the data's system prompt, and held-out rows."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.data.image_turns import MARK
from lightning_peft.data.samples import METADATA_KEYS, UNDESIRABLE, Message, Sample

# Stored with the prepared rows; never in a record that goes with an adapter, as it holds rows.
FILE = "prompts.json"
# Validation rows that are kept, the longest conversation of them, and all, in characters.
MAX_HELD_OUT, MAX_CHARACTERS, MAX_ALL_CHARACTERS = 100, 20_000, 400_000
# Bytes of all images of rows that are kept.
MAX_IMAGE_BYTES = 3_000_000
# Different system prompts that are counted; data with more has no typical one.
MAX_SYSTEM_PROMPTS = 1_000
_ROLES = frozenset({"system", "user", "assistant"})
_ASKED_WITHOUT = METADATA_KEYS | {"role", "content", "train"}


class PromptCollector:
    """Collects the prompts of conversations while rows are prepared."""

    def __init__(self) -> None:
        self._systems: Counter[str] = Counter()
        self._conversations = 0
        self._held_out: list[list[Message]] = []
        self._characters = self._image_bytes = 0

    def add(self, sample: Sample, split: str) -> None:
        """Counts a row of ``train``, or keeps one of ``validation``."""
        if not sample.messages:
            return
        if split == "train":
            self._conversations += 1
            first = sample.messages[0]
            text = first["content"] if first["role"] == "system" else ""
            known = isinstance(text, str) and (
                text in self._systems or len(self._systems) < MAX_SYSTEM_PROMPTS
            )
            # A chat shows images in the user's turns alone.
            known = known and not (sample.images and MARK in text)
            if known and text and len(text) <= MAX_CHARACTERS:
                self._systems[text] += 1
        # Without its tools, a row would be asked for something else.
        elif (
            split == "validation"
            and not sample.context
            and sample.label != UNDESIRABLE
            and len(self._held_out) < MAX_HELD_OUT
        ):
            image_size = sum(map(len, sample.images))
            fits = self._image_bytes + image_size <= MAX_IMAGE_BYTES
            turns = _plain(sample.messages) if fits else None
            size = sum(len(turn["content"]) for turn in turns or ())
            if self._characters + size > MAX_ALL_CHARACTERS:
                return
            if turns is not None and sample.images:
                turns = _with_images(turns, sample.images)
            if turns is not None:
                self._held_out.append(turns)
                self._characters += size
                self._image_bytes += image_size

    def write(self, folder: Path) -> None:
        """Writes what was found to a folder, if there was a conversation at all."""
        if not self._conversations and not self._held_out:
            return
        text, rows = next(iter(self._systems.most_common(1)), ("", 0))
        content = {
            "system": {"text": text, "rows": rows, "of": self._conversations},
            "held_out": self._held_out,
        }
        (folder / FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _plain(messages: list[Message]) -> list[Message] | None:
    """Returns turns that can be asked as text, the answer last; ``None`` where they cannot."""
    # Calls of tools and thoughts are part of the conversation, or of the answer.
    if any(one[key] for one in messages for key in one.keys() - _ASKED_WITHOUT):
        return None
    turns = [{"role": one["role"], "content": one["content"]} for one in messages]
    if not all(one["role"] in _ROLES and isinstance(one["content"], str) for one in turns):
        return None
    long = sum(len(one["content"]) for one in turns) > MAX_CHARACTERS
    ends = [one["role"] for one in turns[-2:]] == ["user", "assistant"]
    return turns if ends and not long and turns[-1]["content"].strip() else None


def _with_images(turns: list[Message], images: Sequence[bytes]) -> list[Message] | None:
    """Returns turns with their images in base64.

    ``None`` where one stands after text or in a turn that is not the user's: a chat shows the
    images of a user's turn before its text.
    """
    waiting = iter(images)
    found = []
    for turn in turns:
        text = turn["content"].lstrip(MARK if turn["role"] == "user" else "")
        if MARK in text:
            return None
        own = [next(waiting) for _ in range(len(turn["content"]) - len(text))]
        shown = {"images": [base64.b64encode(image).decode("ascii") for image in own]}
        found.append({**turn, "content": text, **(shown if own else {})})
    return found


def read_prompts(folder: Path) -> dict[str, Any] | None:
    """Returns the prompts of the rows that were prepared in a folder, if any."""
    file = folder / FILE
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
