"""Thoughts in turns: in a key of their own, in parts of the content, or between marks in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from lightning_peft.data.samples import Message

Reasoning = Literal["train", "mask", "strip"]

# The first is what most chat templates read, and what a turn holds here.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Types of parts of a content that are thoughts.
REASONING_PART_TYPES = ("thinking", "reasoning")
_NAMES = "think|thinking|thought|reasoning"
# At the start of an answer. Where the opening mark is in the prompt, the closing one is alone.
_INLINE = re.compile(
    rf"\A\s*(?:<(?P<name>{_NAMES})>(?P<body>.*?)</(?P=name)>"
    r"|\[THINK\](?P<mistral>.*?)\[/THINK\]|(?P<rest>.*?)</think>)\s*",
    re.DOTALL,
)


def inline_reasoning(message: Message) -> re.Match[str] | None:
    """Returns the thoughts that the content of an answer begins with, marks and all."""
    return _INLINE.match(message["content"]) if message["role"] == "assistant" else None


def reasoning_texts(message: Message) -> list[str]:
    """Returns the thoughts of a turn without their marks, stripped; empty ones are not there."""
    found = inline_reasoning(message)
    inside = found.group("body", "mistral", "rest") if found else ()
    written = [message.get(REASONING_KEYS[0]), *inside]
    return [text.strip() for text in written if isinstance(text, str) and text.strip()]


def merge_reasoning(message: Message) -> Message | None:
    """Returns an answer whose thoughts stand in their key alone; ``None`` if two differ."""
    thought, found = message.get(REASONING_KEYS[0]), inline_reasoning(message)
    if not thought or found is None:
        return message
    inside = next(text for text in found.group("body", "mistral", "rest") if text is not None)
    if inside.strip() not in ("", thought.strip()):
        return None
    return {**message, "content": message["content"][found.end() :]}


def strip_reasoning(message: Message) -> Message:
    """Returns a turn without its thoughts."""
    if message["role"] != "assistant":
        return message
    rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    found = inline_reasoning(rest)
    return {**rest, "content": rest["content"][found.end() :]} if found else rest


def replace_reasoning(message: Message, body: str, text: str) -> Message:
    """Returns a turn with ``text`` in place of ``body``, one of :func:`reasoning_texts`."""
    key = message.get(REASONING_KEYS[0])
    if isinstance(key, str) and key.strip() == body:
        return {**message, REASONING_KEYS[0]: text}
    return {**message, "content": message["content"].replace(body, text, 1)}


def template_message(message: Mapping[str, Any]) -> Message:
    """Returns a turn as chat templates read it, its thoughts under each of their names."""
    turn = {key: value for key, value in message.items() if key != "train"}
    if turn.get(REASONING_KEYS[0]):
        turn = {**dict.fromkeys(REASONING_KEYS, turn[REASONING_KEYS[0]]), **turn}
    return turn
