"""Interactive chat with commands, on a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.chat.chat_model import Answer, ChatModel
from lightning_peft.chat.images import read_for_chat
from lightning_peft.errors import ConfigError, similar_names
from lightning_peft.export.adapters import BASE

HELP = """\
/adapter NAME   this adapter answers from now on; the conversation stays
/base           the base answers, without an adapter
/adapters       who there is
/image PATH     the next question is about this image, and about others named before it
/reset          forget the conversation
/help           this
/quit           end (so does the end of the input)
Any other line is a question. A line that begins with // is a question that begins with /."""


@dataclass
class Conversation:
    """What was said so far."""

    chat_model: ChatModel
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    # Bytes of the image files that go with the next question.
    images: list[bytes] = field(default_factory=list)

    def ask(self, question: str, write: Callable[[str], None]) -> Answer:
        """Asks the active speaker; question and answer become part of the conversation."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        turn: dict[str, Any] = {"role": "user", "content": question}
        if self.images:
            turn["images"] = list(self.images)
        answer = self.chat_model.answer([*opening, *self.turns, turn], write)
        self.turns += [turn, {"role": "assistant", "content": answer.text}]
        self.images.clear()
        return answer

    def add_image(self, path: str) -> str:
        """Reads an image for the next question; returns its size in words."""
        content, size = read_for_chat(path, self.chat_model.require_images(repr(path)))
        self.images.append(content)
        return size

    def run_command(self, line: str) -> str | None:
        """Carries out a command; returns a reply, or ``None`` if the conversation is to end."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return None
        if word == "/help":
            return HELP
        if word == "/reset":
            self.turns.clear()
            self.images.clear()
            return "the conversation is forgotten"
        if word == "/adapters":
            active = self.chat_model.active
            return "\n".join(f"{'*' if n == active else ' '} {n}" for n in self.chat_model.names)
        if word in ("/adapter", "/base"):
            self.chat_model.switch(BASE if word == "/base" else rest)
            return f"{self.chat_model.active} answers"
        if word == "/image":
            return f"{rest}: {self.add_image(rest)}; the next question is about it"
        known = ("/adapter", "/base", "/adapters", "/image", "/reset", "/help", "/quit")
        raise ConfigError(
            f"There is no command {word!r}{similar_names(word, known)}. /help lists all."
        )


def is_command(line: str) -> bool:
    """Returns whether a line is a command."""
    return line.startswith("/") and not line.startswith("//")


def question_of(line: str) -> str:
    """Returns the question in a line that is not a command."""
    return line[1:] if line.startswith("//") else line
