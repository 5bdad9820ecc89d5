"""Chat templates with image placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_peft.data.image_turns import MARK
from lightning_peft.data.samples import Message
from lightning_peft.data.templates import Rendering, Template, find_template
from lightning_peft.data.turns import template_message
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from lightning_peft.data.image_tokens import ImageTokens

_WORD = "Picture7240"


@dataclass(frozen=True)
class ImageTemplate(Template):
    """A chat template with the placeholder that it writes for an image, ``token``.

    ``parts`` indicates whether the content of a turn is a list of parts, else it is a text with the
    token; ``start`` is the start token, where the processor puts it before each text.
    """

    token: str = ""
    parts: bool = True
    start: str = ""

    @property
    def marks_answers(self) -> bool:
        """False: marks of answers are of the text before images become longer."""
        return False


class ImageRendering(Rendering):
    """Renders conversations whose turns have marks for images."""

    template: ImageTemplate

    def message(self, message: Mapping[str, Any]) -> Message:
        """Returns a turn as the template reads it."""
        turn, content = template_message(message), message["content"]
        if not self.template.parts:
            return {**turn, "content": content.replace(MARK, self.template.token)}
        return {**turn, "content": _parts(content)}

    def text(
        self, messages: Sequence[Message], context: Mapping[str, Any], prompt: bool = False
    ) -> str:
        """Returns a conversation as text, with the start token that the processor would add."""
        text = super().text(messages, context, prompt)
        start = self.template.start
        return text if text.startswith(start) else start + text


def _parts(content: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for place, text in enumerate(content.split(MARK)):
        parts += [{"type": "image"}] if place else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def image_template(images: ImageTokens, requested: str | None) -> ImageTemplate:
    """Returns the chat template of a processor, or the one asked for; refuses one of text alone."""
    tokenizer: Any = images.processor.tokenizer
    found = find_template(tokenizer, requested)
    start = tokenizer.bos_token if tokenizer.bos_token_id is not None else None
    begins = start and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    for parts in (True, False):
        template = ImageTemplate(
            found.name, found.text, images.token, parts, str(start) if begins else ""
        )
        if _writes_images(tokenizer, template):
            return template
    raise ConfigError(
        f"The chat template {found.name} does not write {images.token!r} for an image in a user's "
        "turn, so the model would not see it. Leave chat_template out for the processor's own, or "
        "give one that reads parts of a content."
    )


def _writes_images(tokenizer: Any, template: ImageTemplate) -> bool:
    turn = {"role": "user", "content": f"{MARK}{_WORD}"}
    try:
        text = ImageRendering(tokenizer, template).text([turn], {})
    except EncodingProblem:
        return False
    # A template for texts writes a list as Python does.
    return text.count(template.token) == 1 and _WORD in text and "'type'" not in text
