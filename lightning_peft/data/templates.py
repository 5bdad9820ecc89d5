"""Chat templates, and rendering of conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_peft.data.samples import Message
from lightning_peft.data.template_context import reserved
from lightning_peft.data.turns import template_message
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError, similar_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_GENERATION_PROMPT = "{% if add_generation_prompt %}{{ 'PROMPT' }}{% endif %}"
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}"
    # Where the tokenizer ends with another token, that one must be learnt as well.
    "{% if message['role'] == 'assistant' and eos_token != '<|im_end|>' %}"
    "{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}" + _GENERATION_PROMPT.replace("PROMPT", "<|im_start|>assistant\\n")
)
_PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}" + _GENERATION_PROMPT.replace("PROMPT", "### Assistant:\\n")
)
_RAW = (
    "{% for message in messages %}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
NAMED = {"chatml": _CHATML, "plain": _PLAIN, "raw": _RAW}


# What transformers gives every template, with the special tokens of its tokenizer.
_STANDARD_VARIABLES = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt"),
        *("raise_exception", "strftime_now"),
    )
)


@dataclass(frozen=True)
class Template:
    """The Jinja source of a chat template, and its name for messages."""

    name: str
    text: str

    @property
    def marks_answers(self) -> bool:
        """Whether it marks the text of the assistant (``{% generation %}``)."""
        return re.search(r"\{%[-+]?\s*generation\b", self.text) is not None


def find_template(tokenizer: PreTrainedTokenizerBase, requested: str | None) -> Template:
    """Returns the chat template: the tokenizer's own, a named one, or Jinja source."""
    name = tokenizer.name_or_path or type(tokenizer).__name__
    several = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if requested is None:
        if several:
            return Template(f"of {name}", _combine_named(several, name))
        try:
            return Template(f"of {name}", tokenizer.get_chat_template())
        except ValueError as error:
            raise ConfigError(
                f"The tokenizer {name!r} has no chat template, so nothing shows how turns become "
                "text. If this is the base of a chat model, use the tokenizer of that. Otherwise "
                'choose one: chat_template="chatml" (the field\'s usual marks), "plain" (headings '
                'in words), "raw" (prompt and answer one after the other), or Jinja source. Ask '
                "the tuned model with the same one."
            ) from error
    if requested in NAMED:
        starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        # As the tokenizer begins every other text.
        return Template(requested, ("{{ bos_token }}" if starts else "") + NAMED[requested])
    if requested in several:
        return Template(f"{requested!r} of {name}", several[requested])
    if "{%" not in requested and "{{" not in requested:
        known = [*NAMED, *several]
        raise ConfigError(
            f"chat_template={requested!r} is neither Jinja source nor one of {', '.join(known)}"
            f"{similar_names(requested, known)}."
        )
    return Template("given as chat_template", requested)


def _combine_named(several: dict[str, str], name: str) -> str:
    """Returns one source for named templates, which chooses by tools, as transformers does."""
    if "default" not in several:
        listed = ", ".join(f'chat_template="{one}"' for one in several)
        raise ConfigError(
            f"The tokenizer {name!r} has the chat templates {', '.join(several)}, and none is "
            f"called default. Choose one: {listed}."
        )
    if "tool_use" not in several:
        return several["default"]
    # Jinja drops the last line end of a source, and the line end after a block.
    with_tools, without = (several[one].removesuffix("\n") for one in ("tool_use", "default"))
    return f"{{% if tools %}}\n{with_tools}{{% else %}}\n{without}{{% endif %}}"


class _Generation(Extension):
    """Reads ``{% generation %}``, which transformers adds to Jinja, as if it were not there."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """Returns the nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def _free_names(text: str) -> frozenset[str]:
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols, _Generation])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(text)))
    except TemplateError:
        # Its fault is reported when it renders a row.
        return frozenset()


class Rendering:
    """Renders conversations with one chat template and defaults for its variables."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.template = template
        self.defaults = dict(variables or {})

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads from outside, but those that transformers sets."""
        return (
            _free_names(self.template.text)
            - _STANDARD_VARIABLES
            - set(self.tokenizer.special_tokens_map)
        )

    def text(
        self, messages: Sequence[Message], context: Mapping[str, Any], prompt: bool = False
    ) -> str:
        """Returns a conversation as text; ``prompt`` adds the beginning of an answer."""
        found: str = self.apply(messages, context, tokenize=False, add_generation_prompt=prompt)
        return found

    def message(self, message: Mapping[str, Any]) -> Message:
        """Returns a turn as the template reads it."""
        return template_message(message)

    def apply(self, messages: Sequence[Message], context: Mapping[str, Any], **options: Any) -> Any:
        """Calls ``apply_chat_template``; an :class:`EncodingProblem` if the template refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                [self.message(message) for message in messages],
                chat_template=self.template.text,
                **{**self.defaults, **context},
                **options,
            )
        # Templates are code: of the sandbox alone, an OverflowError for a long range.
        except (
            *(TemplateError, TypeError, ValueError, AttributeError),
            *(LookupError, ArithmeticError, RecursionError),
        ) as error:
            raise EncodingProblem(
                "template", f"is refused by the chat template {self.template.name}: {error}"
            ) from error

    def with_tool_arguments(
        self, messages: Sequence[Message], context: Mapping[str, Any]
    ) -> list[Message]:
        """Returns turns with tool arguments as the template takes them: objects, or JSON text."""
        turns = list(messages)
        if not any(turn.get("tool_calls") for turn in turns):
            return turns
        problems = []
        for form in (turns, [_with_json_arguments(turn) for turn in turns]):
            try:
                text = self.text(form, context)
            except EncodingProblem as problem:
                problems.append(problem)
            else:
                if not any(_as_python(arguments, text) for arguments in _arguments(turns)):
                    return form
        if problems:
            raise problems[0]
        raise EncodingProblem(
            "template",
            f"has tool calls whose arguments the chat template {self.template.name} does not "
            "write as JSON",
        )


def _arguments(turns: Sequence[Message]) -> list[dict[str, Any]]:
    return [call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", [])]


def _as_python(arguments: dict[str, Any], text: str) -> bool:
    """Returns whether arguments stand in a text as Python writes them, with single quotes."""
    python = str(arguments)
    return python != json.dumps(arguments, ensure_ascii=False) and python in text


def _with_json_arguments(turn: Message) -> Message:
    if not turn.get("tool_calls"):
        return turn
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in turn["tool_calls"]
    ]
    return {**turn, "tool_calls": calls}


def check_variables(values: Mapping[str, Any], what: str, known: frozenset[str]) -> None:
    """Refuses values for variables that a template does not use."""
    taken = reserved(values)
    unknown = [name for name in values if name not in known and name not in taken]
    problems = [f"{name!r} is set by the data and its other arguments" for name in taken]
    problems += [f"{what} has no variable {name!r}{similar_names(name, known)}" for name in unknown]
    if problems:
        has = f" It has {', '.join(sorted(known))}." if known else ""
        raise ConfigError(
            f"chat_template_kwargs={dict(values)!r} cannot be used: {'; '.join(problems)}.{has}"
        )
