"""Thoughts in turns: in a key of their own, in parts of the content, or between marks in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from lightning_peft.data.samples import Message

Reasoning = Literal["train", "mask", "strip"]

# The first is what most chat templates read, and what a turn holds here.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Types of parts of a content that are thoughts.
THOUGHT_PARTS = ("thinking", "reasoning")
_NAMES = "think|thinking|thought|reasoning"
# At the start of an answer. Where the opening mark is in the prompt, the closing one is alone.
_INLINE = re.compile(
    rf"\A\s*(?:<(?P<name>{_NAMES})>(?P<body>.*?)</(?P=name)>"
    r"|\[THINK\](?P<mistral>.*?)\[/THINK\]|(?P<rest>.*?)</think>)\s*",
    re.DOTALL,
)


def inline(message: Message) -> re.Match[str] | None:
    """Returns the thoughts that the content of an answer begins with, marks and all."""
    return _INLINE.match(message["content"]) if message["role"] == "assistant" else None


def bodies(message: Message) -> list[str]:
    """Returns the thoughts of a turn without their marks, stripped; empty ones are not there."""
    found = inline(message)
    inside = found.group("body", "mistral", "rest") if found else ()
    written = [message.get(THOUGHTS[0]), *inside]
    return [text.strip() for text in written if isinstance(text, str) and text.strip()]


def in_one_place(message: Message) -> Message | None:
    """Returns an answer whose thoughts stand in their key alone; ``None`` if two differ."""
    thought, found = message.get(THOUGHTS[0]), inline(message)
    if not thought or found is None:
        return message
    inside = next(text for text in found.group("body", "mistral", "rest") if text is not None)
    if inside.strip() not in ("", thought.strip()):
        return None
    return {**message, "content": message["content"][found.end() :]}


def without(message: Message) -> Message:
    """Returns a turn without its thoughts."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in THOUGHTS}
    found = inline(kept)
    return {**kept, "content": kept["content"][found.end() :]} if found else kept


def replaced(message: Message, body: str, text: str) -> Message:
    """Returns a turn in which ``text`` stands for the thoughts ``body``, of :func:`bodies`."""
    key = message.get(THOUGHTS[0])
    if isinstance(key, str) and key.strip() == body:
        return {**message, THOUGHTS[0]: text}
    return {**message, "content": message["content"].replace(body, text, 1)}


def for_templates(message: Mapping[str, Any]) -> Message:
    """Returns a turn as chat templates read it, its thoughts under each of their names."""
    turn = {key: value for key, value in message.items() if key != "train"}
    if turn.get(THOUGHTS[0]):
        turn = {**dict.fromkeys(THOUGHTS, turn[THOUGHTS[0]]), **turn}
    return turn
