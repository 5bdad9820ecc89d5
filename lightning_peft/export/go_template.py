"""From a chat template in Jinja to one of Ollama's, in Go's language, where both can say the same.

Most chat templates put fixed text around each turn, by its role. That text is found by rendering
conversations of marked turns; the result is compared with the original on others. Templates that
do more are not translated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

Messages = Sequence[dict[str, str]]
_MARKS = {"system": "SYSTEMtext", "user": "USERtext", "assistant": "ASSISTANTtext"}


@dataclass(frozen=True)
class Turns:
    """Fixed text around turns.

    Attributes:
        opening: Before the first turn.
        around: Text before and after a turn, by its role.
        prompt: After the last turn, where the answer is to begin.
    """

    opening: str
    around: dict[str, tuple[str, str]] = field(default_factory=dict)
    prompt: str = ""

    def render(self, messages: Messages) -> str:
        """Returns a conversation as text, up to where the answer begins."""
        turns = [m["content"].join(self.around[m["role"]]) for m in messages]
        return self.opening + "".join(turns) + self.prompt

    def as_go(self, bos: str | None) -> str:
        """Returns the template in Go's language.

        Args:
            bos: Token at the beginning of every text, which Ollama adds itself.
        """
        opening = self.opening.removeprefix(bos) if bos else self.opening
        words, text = "if", ""
        for role, (before, after) in self.around.items():
            text += f'{{{{ {words} eq .Role "{role}" }}}}'
            text += f"{_literal(before)}{{{{ .Content }}}}{_literal(after)}"
            words = "else if"
        return f"{_literal(opening)}{{{{ range .Messages }}}}{text}{{{{ end }}}}{{{{ end }}}}" + (
            _literal(self.prompt)
        )


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def translate(tokenizer: Any, template: str) -> Turns | None:
    """Returns the turns of a chat template, or ``None`` if it says more than fixed text says."""

    def rendered(messages: Messages, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        return text

    try:
        found = _turns(rendered)
        if found is None or '"""' in found.as_go(None):
            return None
        return found if _is_the_same(found, rendered) else None
    except (TemplateError, ValueError):
        return None


def _turn(role: str, content: str | None = None) -> dict[str, str]:
    return {"role": role, "content": content or _MARKS[role]}


def _turns(rendered: Any) -> Turns | None:
    user, assistant, system = _MARKS["user"], _MARKS["assistant"], _MARKS["system"]
    one = rendered([_turn("user")])
    head, after_user = _cut(one, user)
    _, middle = _cut(rendered([_turn("user"), _turn("assistant")]), user)
    between, after_assistant = _cut(middle, assistant)
    again = [_turn("user"), _turn("assistant"), _turn("user", "NEXTtext")]
    _, later = _cut(rendered(again), assistant)
    before_next, _ = _cut(later, "NEXTtext")
    if not (between.startswith(after_user) and before_next.startswith(after_assistant)):
        return None
    before_user = before_next[len(after_assistant) :]
    if not head.endswith(before_user):
        return None
    opening = head[: len(head) - len(before_user)]
    around = {
        "user": (before_user, after_user),
        "assistant": (between[len(after_user) :], after_assistant),
    }
    try:
        start, rest = _cut(rendered([_turn("system"), _turn("user")]), system)
    except (TemplateError, ValueError):
        # Some templates have no system turn.
        pass
    else:
        after_system, _ = _cut(rest, user)
        if not (start.startswith(opening) and after_system.endswith(before_user)):
            return None
        closing = after_system[: len(after_system) - len(before_user)]
        around = {"system": (start[len(opening) :], closing)} | around
    prompt = rendered([_turn("user")], prompt=True).removeprefix(one)
    return Turns(opening, around, prompt)


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError(f"{mark!r} is not in the rendered text")
    return before, after


def _is_the_same(turns: Turns, rendered: Any) -> bool:
    talk = [_turn("user", "One?"), _turn("assistant", "Two."), _turn("user", "Three?\n\nFour!")]
    longer = [*talk, _turn("assistant", "Five"), _turn("user", "Six")]
    tries = [talk[:1], talk, longer]
    if "system" in turns.around:
        tries += [[_turn("system", "Be kind."), *one] for one in tries]
    return all(turns.render(one) == rendered(one, prompt=True) for one in tries)
