"""Translation of chat templates from Jinja to Ollama's Go templates.

Most chat templates put fixed text around each turn, by its role. Some write a system turn of their
own where there is none (SmolLM2, Qwen2.5), write the system turn into the first or the last user
turn (Llama 2, Gemma, Mistral), or begin each exchange with a token (Llama 2). All of that is found
by rendering conversations of marked turns, up to where an answer begins; the result is compared
with the original on others. Templates that do more are not translated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import Any, Literal

from jinja2 import TemplateError

Messages = Sequence[dict[str, str]]
Rendered = Callable[..., str]
_MARKS = {"system": "SYSTEMtext", "user": "USERtext", "assistant": "ASSISTANTtext"}
_PLACES = {
    "first user": "and $.System (eq $i 1)",
    "last user": "and $.System (eq (len (slice $.Messages $i)) 1)",
}


@dataclass(frozen=True)
class TurnTemplate:
    """Fixed text around turns.

    ``default`` stands in place of a system turn, where there is none; ``between`` before each user
    turn but the first; ``prompt`` after the last turn, where the answer is to begin.
    """

    opening: str
    around: dict[str, tuple[str, str]] = field(default_factory=dict)
    prompt: str = ""
    default: str = ""
    system: Literal["turn", "first user", "last user"] = "turn"
    between: str = ""

    @property
    def end(self) -> str:
        """What ends an answer, such as a token; empty where nothing does."""
        return self.around["assistant"][1].strip().split("\n")[0]

    def render(self, messages: Messages) -> str:
        """Returns a conversation as text, up to where the answer begins."""
        first = messages[0]["role"] == "system"
        system = messages[0]["content"].join(self.around["system"]) if first else ""
        others = messages[first:]
        place = {"first user": 0, "last user": len(others) - 1}.get(self.system)
        text = self.opening
        if not first:
            text += self.default
        elif place is None:
            text += system
        for index, message in enumerate(others):
            before, after = self.around[message["role"]]
            text += self.between if message["role"] == "user" and index else ""
            text += before + (system if index == place else "") + message["content"] + after
        return text + self.prompt

    def as_go(self, bos: str | None) -> str:
        """Returns the template in Go's language; ``bos`` is what Ollama puts before each text.

        Ollama gives the system turn as ``.System``, and as the first of ``.Messages``.
        """
        turns = self._without_first(bos) if bos else self
        text = _literal(turns.opening)
        if turns.default:
            text += f"{{{{ if not .System }}}}{_literal(turns.default)}{{{{ end }}}}"
        text += "{{ range $i, $_ := .Messages }}"
        words = "if"
        for role, (before, after) in turns.around.items():
            if role == "system" and turns.system in _PLACES:
                continue
            text += f'{{{{ {words} eq .Role "{role}" }}}}'
            text += turns._inside_user(before) if role == "user" else _literal(before)
            text += f"{{{{ .Content }}}}{_literal(after)}"
            words = "else if"
        return text + "{{ end }}{{ end }}" + _literal(turns.prompt)

    def _without_first(self, bos: str) -> TurnTemplate:
        """Returns the same without the token that Ollama adds before the first turn."""
        if self.opening.startswith(bos):
            return replace(self, opening=self.opening.removeprefix(bos))
        before, after = self.around["user"]
        if self.opening or self.default or not before.startswith(bos):
            return self
        around = {**self.around, "user": (before.removeprefix(bos), after)}
        return replace(self, around=around, between=self.between + bos)

    def _inside_user(self, before: str) -> str:
        text = ""
        if self.between:
            later = "not (or (eq $i 0) (and $.System (eq $i 1)))"
            text += f"{{{{ if {later} }}}}{_literal(self.between)}{{{{ end }}}}"
        text += _literal(before)
        if self.system in _PLACES:
            system = "{{ $.System }}".join(map(_literal, self.around["system"]))
            text += f"{{{{ if {_PLACES[self.system]} }}}}{system}{{{{ end }}}}"
        return text


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def translate(tokenizer: Any, template: str) -> TurnTemplate | None:
    """Returns the turns of a chat template, or ``None`` if it says more than they can."""

    def rendered(messages: Messages, prompt: bool = True) -> str:
        text: str = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        return text

    try:
        turns = _turns(rendered)
        if '"""' in turns.as_go(None):
            return None
        return turns if _renders_identically(turns, rendered) else None
    except (TemplateError, ValueError):
        return None


def _turn(role: str, content: str | None = None) -> dict[str, str]:
    return {"role": role, "content": content or _MARKS[role]}


def _turns(rendered: Rendered) -> TurnTemplate:
    user, assistant = _MARKS["user"], _MARKS["assistant"]
    exchange = [_turn("user"), _turn("assistant")]
    start, closing = _cut(rendered([_turn("user")]), user)
    _, rest = _cut(rendered([*exchange, _turn("user", "NEXTtext")]), user)
    middle, rest = _cut(rest, assistant)
    bridge, _ = _cut(rest, "NEXTtext")
    # Where a turn ends is seen where nothing follows it.
    after_user = commonprefix([_cut(rendered([_turn("user")], False), user)[1], closing, middle])
    after_assistant = commonprefix([_cut(rendered(exchange, False), assistant)[1], bridge])
    later = bridge[len(after_assistant) :]
    before_user = commonprefix([start[::-1], later[::-1]])[::-1]
    turns = TurnTemplate(
        opening=start.removesuffix(before_user),
        around={
            "user": (before_user, after_user),
            "assistant": (middle[len(after_user) :], after_assistant),
        },
        prompt=closing[len(after_user) :],
        between=later.removesuffix(before_user),
    )
    try:
        head, rest = _cut(rendered([_turn("system"), _turn("user")]), _MARKS["system"])
    except (TemplateError, ValueError):
        # Some templates have no system turn.
        return turns
    behind, _ = _cut(rest, user)
    if behind.endswith(before_user):
        opening = commonprefix([turns.opening, head])
        own = {"system": (head[len(opening) :], behind.removesuffix(before_user))}
        default = turns.opening[len(opening) :]
        return replace(turns, opening=opening, default=default, around={**own, **turns.around})
    if not head.startswith(start):
        raise ValueError("a system turn changes the turns before it")
    long = rendered([_turn("system"), *exchange, _turn("user", "NEXTtext")])
    inside = long.index(_MARKS["system"]) < long.index(assistant)
    around = {**turns.around, "system": (head[len(start) :], behind)}
    return replace(turns, around=around, system="first user" if inside else "last user")


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, match, after = text.partition(mark)
    if not match:
        raise ValueError(f"{mark!r} is not in the rendered text")
    return before, after


def _renders_identically(turns: TurnTemplate, rendered: Rendered) -> bool:
    messages = [_turn("user", "One?"), _turn("assistant", "Two."), _turn("user", "Three?\n\nFour!")]
    longer = [*messages, _turn("assistant", "Five"), _turn("user", "Six")]
    tries = [messages[:1], messages, longer]
    if "system" in turns.around:
        tries += [[_turn("system", "Be kind."), *one] for one in tries]
    return all(turns.render(one) == rendered(one) for one in tries)
