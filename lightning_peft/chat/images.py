"""Images in a conversation: the processor, and their positions in the turns."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from typing import Any

from lightning_peft.data.image_tokens import ImageTokens, expanded
from lightning_peft.data.image_turns import MARK, is_address
from lightning_peft.data.images import as_rgb, decode_image, require_pillow
from lightning_peft.data.processors import digest_of_processor, load_processor
from lightning_peft.data.samples import RowProblems, read_image
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError, UnsupportedError, itemize
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import Base
from lightning_peft.export.loading import IMAGE_TEXT_CLASSES, class_name


def find_images(base: Base, adapters: Sequence[Adapter]) -> tuple[ImageTokens | None, str]:
    """Returns the processor's ways with images, and why a model that sees has none here.

    It is the processor that the first adapter was trained with, else that in the base's folder.
    A model of text has ``None`` and no reason.
    """
    trained = bool(adapters) and "processor" in adapters[0].encoding
    if not _sees_images(base, adapters):
        return None, ""
    try:
        return _find_processor(base, adapters), ""
    except (ConfigError, UnsupportedError) as error:
        # Text needs neither the processor nor Pillow.
        if trained:
            raise
        return None, str(error)


def _find_processor(base: Base, adapters: Sequence[Adapter]) -> ImageTokens:
    require_pillow()
    record = (adapters[0].facts.get("data") or {}) if adapters else {}
    names = ("processor", "processor_config", "processor_revision")
    places: list[tuple[Any, ...]] = [(str(base.folder), None, None)]
    if record.get("processor"):
        places.insert(0, tuple(record.get(name) for name in names))
    problems = []
    for place in places:
        try:
            return ImageTokens(load_processor(*place))
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(
        f"{base.name!r} is a model of images and text, and its processor cannot be had:"
        + itemize(problems)
        + "\nPut its files, which its save_pretrained writes, into the folder of the base."
    )


def _sees_images(base: Base, adapters: Sequence[Adapter]) -> bool:
    # A model that can see may have been trained on text alone, with a tokenizer.
    if adapters and adapters[0].encoding and "processor" not in adapters[0].encoding:
        return False
    return class_name(base, adapters[0] if adapters else None) in IMAGE_TEXT_CLASSES


def note_of_processor(images: ImageTokens, adapters: Sequence[Adapter]) -> list[str]:
    """Returns a note where the processor is not the one that the first adapter was trained with."""
    recorded = adapters[0].encoding.get("processor") if adapters else None
    if recorded in (None, digest_of_processor(images.processor)):
        return []
    return [
        f"the processor is not the one that {adapters[0].name} was trained with, or is read by "
        "another version of transformers: images may become other tokens"
    ]


def read_for_chat(path: str, images: ImageTokens) -> tuple[bytes, str]:
    """Returns the bytes of an image file, and its size and tokens in words."""
    try:
        if not path or is_address(path):
            raise EncodingProblem("image", f"names {path!r} as an image, which is not a file here")
        # Quotes as a shell takes them; a home that does not exist stays as it was written.
        bare = path[1:-1] if path[:1] in "'\"" and path[-1:] == path[:1] and path[1:] else path
        content = read_image(os.path.expanduser(bare))
        shown = as_rgb(decode_image(content))
        (written,) = images.written([content])
    except (RowProblems, EncodingProblem) as error:
        reasons = [text for _, text in getattr(error, "problems", [])] or [str(error)]
        raise ConfigError(f"The question {'; '.join(reasons)}.") from error
    tokens = len(images.processor.tokenizer(written, add_special_tokens=False)["input_ids"])
    return content, f"{shown.width} x {shown.height} pixels, {tokens:,} tokens"


def with_decoded_images(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns turns whose ``images`` are in base64 with their bytes."""
    return [
        {**turn, "images": [_decoded(*one) for one in enumerate(turn["images"], 1)]}
        if turn.get("images")
        else turn
        for turn in turns
    ]


def _decoded(number: int, text: str) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
        decode_image(content)
    except ValueError as error:
        raise ConfigError(f"Image {number} of the turn is not base64: {error}.") from error
    except EncodingProblem as error:
        raise ConfigError(f"Image {number} of the turn {error}.") from error
    return content


def images_of(turns: Sequence[dict[str, Any]]) -> list[bytes]:
    """Returns the images of turns, in their order."""
    return [image for turn in turns for image in turn.get("images", [])]


def with_marks(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns a turn as :class:`ImageRendering <lightning_peft.data.image_templates>` reads it.

    Its images come before its text, as those of a row without places for them.
    """
    if MARK in turn["content"]:
        raise ConfigError(
            "A turn has the character U+FFFC in its text, which stands for an image. Take it out."
        )
    rest = {name: value for name, value in turn.items() if name != "images"}
    return {**rest, "content": MARK * len(turn.get("images", [])) + turn["content"]}


def with_tokens(images: ImageTokens, text: str, content: Sequence[bytes]) -> str:
    """Returns a rendered conversation with the tokens of each image in its place."""
    found = text.count(images.token)
    if found != len(content):
        raise EncodingProblem(
            "image",
            f"has {len(content)} images and, with its template, {found} times {images.token!r}, "
            "which stands for one",
        )
    return expanded(text, images.token, images.written(content))[0]
