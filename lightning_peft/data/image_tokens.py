"""Image tokens of processors, and the positions of images in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.data.images import as_rgb, decode_image
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import UnsupportedError

# What a processor makes of text; all else that it returns is of the images.
_OF_TEXT = ("input_ids", "attention_mask", "text_replacement_offsets")
# Names under which models take which tokens are an image's.
TYPE_NAMES = ("token_type_ids", "mm_token_type_ids")
_OFFSETS = "text_replacement_offsets"


class ImageTokens:
    """What a processor for text and images does to the images of a row.

    Refused is one that does not write an image as tokens of the text, or makes of text what batches
    here do not hold.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.token: str = getattr(processor, "image_token", None) or ""
        if not self.token:
            raise UnsupportedError(
                f"{type(processor).__name__} has no token for images, so it is not known where in "
                "the text an image stands. Models whose images reach the text by cross-attention "
                "(Mllama) are not trained here; take one that writes images as tokens, such as "
                "Qwen-VL, SmolVLM, Gemma 3 or LLaVA."
            )
        # The name under which the model takes which tokens are an image's, if it does.
        self.type_name = self._type_name()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor, with the chat template of the processor."""
        own = getattr(self.processor, "chat_template", None)
        if own and self.processor.tokenizer.chat_template != own:
            self.processor.tokenizer.chat_template = own
        return self.processor.tokenizer

    @property
    def ids(self) -> list[int]:
        """The ids of the tokens that become features of an image."""
        found = getattr(self.processor, "image_token_ids", None) or [self.processor.image_token_id]
        return [int(one) for one in found if one is not None]

    @property
    def special_tokens(self) -> list[str]:
        """The tokens that no text of a row may contain."""
        tokenizer = self.processor.tokenizer
        return [self.token, *map(str, tokenizer.convert_ids_to_tokens(self.ids))]

    def written(self, images: Sequence[bytes]) -> list[str]:
        """Returns the text that the processor puts in the place of each image of a row."""
        if not images:
            return []
        output = self._process([images], **{f"return_{_OFFSETS}": True})
        offsets = output.get(_OFFSETS)
        if not offsets or len(offsets[0]) != len(images):
            raise UnsupportedError(
                f"{type(self.processor).__name__} does not say which tokens it writes for an "
                "image, as processors of transformers 5.23 and later do. Take a newer version, or "
                "a model of another kind."
            )
        return [one["replacement"] for one in offsets[0]]

    def rewritten(
        self, ids: Sequence[int], images: Sequence[bytes], spans: Sequence[tuple[int, int]]
    ) -> list[int]:
        """Returns tokens with those of ``images``, at ``spans``, as they are without others."""
        found = list(ids)
        tokenizer = self.processor.tokenizer
        # From the end, so that places before stay.
        for text, (start, end) in reversed(list(zip(self.written(images), spans, strict=True))):
            new = tokenizer(text, add_special_tokens=False)["input_ids"]
            # The same image may have other tokens at its edges, by the text next to it.
            counts = {sum(one in self.ids for one in part) for part in (new, found[start:end])}
            if len(counts) > 1:
                found[start:end] = new
        return found

    def inputs(self, rows: Sequence[Sequence[bytes]]) -> dict[str, Tensor]:
        """Returns the features of the images of rows, by the names that the model has."""
        with_images = [row for row in rows if row]
        if not with_images:
            return {}
        output = self._process(with_images, return_tensors="pt", padding=True)
        names = (*_OF_TEXT, *TYPE_NAMES)
        return {name: value for name, value in output.items() if name not in names}

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """Returns which tokens are an image's, ``(batch, length)``, where the model takes that."""
        name = self.type_name
        return {} if name is None else {name: torch.isin(ids, torch.tensor(self.ids)).long()}

    def _type_name(self) -> str | None:
        kind = type(self.processor).__name__
        try:
            found = self.processor(text=["a"])
        # Those with code of their own raise almost anything.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise UnsupportedError(
                f"{kind} takes no text without images ({type(error).__name__}: {reason}), and rows "
                "may be text alone. Take a model of another kind."
            ) from error
        others = sorted(set(found) - {*_OF_TEXT, *TYPE_NAMES})
        if others:
            raise UnsupportedError(
                f"{kind} makes {', '.join(others)} of a text, as PaliGemma's and ERNIE's do, and "
                "batches here would not have what its model needs of each token. Take a model of "
                "another kind, such as Qwen-VL, SmolVLM, Gemma 3 or LLaVA."
            )
        return next((name for name in TYPE_NAMES if name in found), None)

    def _process(self, rows: Sequence[Sequence[bytes]], **options: Any) -> Any:
        decoded = [[as_rgb(decode_image(image)) for image in row] for row in rows]
        texts = [self.token * len(row) for row in rows]
        try:
            return self.processor(text=texts, images=decoded, **options)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            sizes = ", ".join(f"{i.width} x {i.height}" for row in decoded for i in row)
            reason = str(error).strip().partition("\n")[0]
            raise EncodingProblem(
                "image", f"has an image ({sizes}) that the processor refuses: {reason}"
            ) from error


def expanded(
    text: str, token: str, written: Sequence[str]
) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns a text with what is ``written`` for each image in the place of its ``token``.

    Also first and last character of each image in it, and for :func:`moved` the character after
    each token in ``text`` with the characters that are added up to there.
    """
    pieces, spans, gains = [], [], []
    last = length = 0
    for found, new in zip(re.finditer(re.escape(token), text), written, strict=True):
        before = text[last : found.start()]
        start = length + len(before)
        pieces += [before, new]
        length = start + len(new)
        spans.append((start, length))
        last = found.end()
        gains.append((last, length - last))
    return "".join([*pieces, text[last:]]), spans, gains


def moved(span: tuple[int, int], gains: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns where a span of characters is after images became longer."""
    first, last = (
        place + next((gain for end, gain in reversed(gains) if end <= place), 0) for place in span
    )
    return first, last
