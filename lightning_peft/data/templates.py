"""Chat templates: the tokenizer's own, or one of a few that are asked for by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_peft.errors import ConfigError

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


@dataclass(frozen=True)
class Template:
    """A chat template and what it is called.

    Attributes:
        name: ``"chatml"``, ``"plain"``, ``"raw"``, or whose own it is.
        text: The Jinja source.
    """

    name: str
    text: str

    @property
    def marks_answers(self) -> bool:
        """Whether it says itself what the assistant generates (``{% generation %}``)."""
        return re.search(r"\{%[-+]?\s*generation\b", self.text) is not None


def find_template(tokenizer: PreTrainedTokenizerBase, asked: str | None) -> Template:
    """Returns the template to render conversations with.

    Args:
        tokenizer: The tokenizer.
        asked: ``None`` for the tokenizer's own, else ``"chatml"``, ``"plain"``, ``"raw"``, or the
            Jinja source of a template.

    Raises:
        ConfigError: If the tokenizer has none and none was asked for, or the name is unknown.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if asked is None:
        try:
            return Template(f"of {name}", tokenizer.get_chat_template())
        except ValueError as error:
            raise ConfigError(
                f"The tokenizer {name!r} has no chat template, so nothing says how turns become "
                "text. If this is the base of a chat model, use the tokenizer of that. Otherwise "
                'choose one: chat_template="chatml" (the field\'s usual marks), "plain" (headings '
                'in words), "raw" (prompt and answer one after the other), or Jinja source. Ask '
                "the tuned model with the same one."
            ) from error
    if asked in NAMED:
        starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        # As the tokenizer begins every other text.
        return Template(asked, ("{{ bos_token }}" if starts else "") + NAMED[asked])
    if "{%" not in asked and "{{" not in asked:
        raise ConfigError(
            f"chat_template={asked!r} is neither Jinja source nor one of {', '.join(NAMED)}."
        )
    return Template("given as chat_template", asked)
