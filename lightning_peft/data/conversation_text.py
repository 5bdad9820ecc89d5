"""Rendering of conversations to text, with the spans of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_peft.data.samples import Message
from lightning_peft.data.templates import Rendering
from lightning_peft.data.turns import (
    Reasoning,
    reasoning_texts,
    replace_reasoning,
    strip_reasoning,
)
from lightning_peft.data.validation import EncodingProblem

LossOn = Literal["assistant", "completion"]
Span = tuple[int, int]
# A text that no template or reasoning contains.
_MARK = "Thought7240"


@dataclass(frozen=True)
class Part:
    """A conversation up to one of its answers, with the text that it is rendered to.

    ``answers`` are the first and last characters of the trained answers, by the place of their
    turn; ``hidden`` those of the answers that are not trained.
    """

    messages: list[Message]
    text: str
    answers: dict[int, Span]
    hidden: tuple[Span, ...] = ()


class ConversationText:
    """Renders conversations as texts in which each answer follows the prompt it is generated from.

    Usually one text has all answers. Where a template renders earlier turns differently, such as
    without their reasoning, earlier answers are trained in texts of their own.
    """

    def __init__(self, rendering: Rendering, loss_on: LossOn, reasoning: Reasoning) -> None:
        self.rendering, self.loss_on, self.reasoning = rendering, loss_on, reasoning

    def turns(self, messages: Sequence[Message], context: Mapping[str, Any]) -> list[Message]:
        """Returns the turns as they are rendered."""
        turns = map(strip_reasoning, messages) if self.reasoning == "strip" else messages
        return self.rendering.with_tool_arguments(list(turns), context)

    def trained(self, messages: Sequence[Message]) -> list[int]:
        """Returns the places of the turns that are learnt."""
        answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        if self.loss_on == "completion":
            answers = answers[-1:]
        return [place for place in answers if messages[place].get("train", True)]

    def parts(self, messages: Sequence[Message], context: Mapping[str, Any]) -> list[Part]:
        """Returns the texts, in the order of their last answers."""
        places = self.trained(messages)
        if not places:
            raise EncodingProblem(
                "untrained", "has no turn to learn: the weights of its assistant turns are 0"
            )
        found: list[Part] = []
        while places:
            part = self._part(messages, context, places)
            found.insert(0, part)
            places = [place for place in places if place not in part.answers]
        return found

    def _part(
        self, messages: Sequence[Message], context: Mapping[str, Any], places: Sequence[int]
    ) -> Part:
        """Returns the text up to the last of ``places``, with those answers that it shows."""
        last = places[-1]
        whole = list(messages[: last + 1])
        text = self.rendering.text(whole, context)
        answers = {}
        for place in places:
            before = self.rendering.text(messages[:place], context, prompt=True)
            upto = text
            if place != last:
                upto = self.rendering.text(messages[: place + 1], context)
                if not text.startswith(upto):
                    # Some templates end every text with the end token, whatever its last turn.
                    upto = upto.rstrip().removesuffix(self.rendering.tokenizer.eos_token)
            if text.startswith(before) and text.startswith(upto):
                answers[place] = (len(before), len(upto))
            elif place == last:
                raise EncodingProblem("template", self._other_prompt(place, before))
        return Part(whole, text, answers)

    def _other_prompt(self, place: int, before: str) -> str:
        return (
            f"cannot be masked with the chat template {self.rendering.template.name}: the model is "
            f"asked for turn {place + 1} with a prompt that ends with {before[-30:]!r}, and the "
            "turn is written after another one"
        )

    def check_contents(self, turns: Sequence[Message], context: Mapping[str, Any]) -> None:
        """Refuses turns whose text the template leaves out, as some do with a system turn."""
        text = self.rendering.text(turns, context)
        for place, turn in enumerate(turns):
            if not turn["content"].strip() or turn["content"].strip() in text:
                continue
            # A template may change the text, but not render the same for any text.
            others = [*turns[:place], {**turn, "content": _MARK}, *turns[place + 1 :]]
            if self.rendering.text(others, context) == text:
                name = self.rendering.template.name
                raise EncodingProblem(
                    "key",
                    f"has a text in turn {place + 1} ({turn['role']}) that the chat template "
                    f"{name} leaves out",
                )

    def with_masked_reasoning(self, part: Part, context: Mapping[str, Any]) -> Part:
        """Returns a part with its untrained reasoning hidden; refuses what is not rendered."""
        hidden = []
        for place, (first, last) in part.answers.items():
            for body in reasoning_texts(part.messages[place]):
                if body not in part.text[first:last]:
                    raise EncodingProblem(
                        "thoughts",
                        f"has thoughts in turn {place + 1} that the chat template "
                        f"{self.rendering.template.name} does not write",
                    )
                if self.reasoning == "mask":
                    hidden.append(self._characters(part, context, place, body))
        return Part(part.messages, part.text, part.answers, tuple(hidden))

    def _characters(self, part: Part, context: Mapping[str, Any], place: int, body: str) -> Span:
        """Returns where the thoughts of a turn are, by what stands around others in their place."""
        turns = [*part.messages]
        turns[place] = replace_reasoning(turns[place], body, _MARK)
        before, mark, after = self.rendering.text(turns, context).partition(_MARK)
        text = part.text
        if not mark or not text.startswith(before) or not text.endswith(after):
            raise EncodingProblem(
                "thoughts",
                f"has thoughts in turn {place + 1} that cannot be separated from its answer",
            )
        return len(before), len(text) - len(after)
