"""Chat templates: the tokenizer's own, or one of a few that are asked for by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    """Returns the chat template: the tokenizer's own, a named one, or Jinja source.

    Raises:
        ConfigError: If the tokenizer has none and none was requested, or the name is unknown.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    several = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if requested is None:
        if several:
            return Template(f"of {name}", _combine_named(several, name))
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
    """Returns one source for a tokenizer with named templates, which chooses as transformers does.

    Rows with tools are rendered by the template ``tool_use`` if there is one, all others by
    ``default``. As one source, it is recorded and exported like any other.
    """
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
