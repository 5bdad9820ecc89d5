"""A conversation with commands, line by line, from a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_peft.chat.chat_model import Answer, ChatModel
from lightning_peft.errors import ConfigError, similar_names
from lightning_peft.export.adapters import BASE

HELP = """\
/adapter NAME   this adapter answers from now on; the conversation stays
/base           the base answers, without an adapter
/adapters       who there is
/reset          forget the conversation
/help           this
/quit           end (so does the end of the input)
Any other line is a question. A line that begins with // is a question that begins with /."""


@dataclass
class Conversation:
    """What was said so far.

    Attributes:
        speaker: Who answers.
        system: System turn, if there is one.
        turns: Questions and answers.
    """

    chat_model: ChatModel
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str, write: Callable[[str], None]) -> Answer:
        """Asks the active speaker; question and answer become part of the conversation.

        Raises:
            ConfigError: If the question cannot be put; the conversation is as before.
        """
        opening = [{"role": "system", "content": self.system}] if self.system else []
        turn = {"role": "user", "content": question}
        answer = self.chat_model.answer([*opening, *self.turns, turn], write)
        self.turns += [turn, {"role": "assistant", "content": answer.text}]
        return answer

    def run_command(self, line: str) -> str | None:
        """Carries out a command.

        Returns:
            What to tell the user, or ``None`` if the conversation is to end.

        Raises:
            ConfigError: If there is no such command or adapter.
        """
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return None
        if word == "/help":
            return HELP
        if word == "/reset":
            self.turns.clear()
            return "the conversation is forgotten"
        if word == "/adapters":
            active = self.chat_model.active
            return "\n".join(f"{'*' if n == active else ' '} {n}" for n in self.chat_model.names)
        if word in ("/adapter", "/base"):
            self.chat_model.switch(BASE if word == "/base" else rest)
            return f"{self.chat_model.active} answers"
        known = ("/adapter", "/base", "/adapters", "/reset", "/help", "/quit")
        raise ConfigError(
            f"There is no command {word!r}{similar_names(word, known)}. /help lists all."
        )


def is_command(line: str) -> bool:
    """Says whether a line is a command."""
    return line.startswith("/") and not line.startswith("//")


def question_of(line: str) -> str:
    """Returns the question in a line that is not a command."""
    return line[1:] if line.startswith("//") else line
