"""Rows without turns: texts, labels, tags, images, translations and recordings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.data.audio import Recording
from lightning_peft.data.json_text import json_type
from lightning_peft.data.samples import (
    RowProblems,
    Sample,
    collect,
    required_texts,
    row_problem,
    shortened,
)


def parse_text(fields: Mapping[str, Any]) -> Sample:
    """Returns plain text."""
    return Sample(text=required_texts(fields, ["text"])[0])


def _label(value: Any) -> str:
    """Returns the name of a class; a whole number is its own name until names are given."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise row_problem("missing", "has no label")
    if isinstance(value, (list, dict)):
        raise row_problem("label", f"has {shortened(value)} as label, and one label is trained")
    if isinstance(value, float) and not value.is_integer():
        raise row_problem("label", f"has the label {value}; labels are names or whole numbers")
    if isinstance(value, float):
        # Tables with a gap in a column of whole numbers hold floats.
        value = int(value)
    return str(value).strip()


def parse_label(fields: Mapping[str, Any]) -> Sample:
    """Returns a text, or two that belong together, and its class."""
    text, pair, label = collect(
        lambda: required_texts(fields, ["text"])[0],
        lambda: required_texts(fields, ["text_pair"])[0] if "text_pair" in fields else None,
        lambda: _label(fields.get("label")),
    )
    return Sample(text=text, text_pair=pair, label=label)


def _list_of(fields: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> list[str]:
    value, expected = fields.get(name), "text or a whole number" if int in kinds else "text"
    if value is None or value == []:
        raise row_problem("missing", f"has no {name}" if value is None else f"has empty {name}")
    if not isinstance(value, list):
        raise row_problem("missing", f"has no list as {name}: {shortened(value)}")
    problems = [
        (
            "missing",
            f"has {shortened(item)} as number {place} of its {name}, which is not {expected}",
        )
        for place, item in enumerate(value)
        # Python counts True among the numbers.
        if not isinstance(item, kinds) or isinstance(item, bool) or not str(item).strip()
    ]
    if problems:
        raise RowProblems(problems)
    return [str(item) for item in value]


def parse_tags(fields: Mapping[str, Any]) -> Sample:
    """Returns words and their tags."""
    tokens, tags = collect(
        lambda: _list_of(fields, "tokens", (str,)),
        lambda: _list_of(fields, "tags", (str, int)),
    )
    if len(tokens) != len(tags):
        raise row_problem("tags", f"has {len(tokens)} tokens and {len(tags)} tags")
    return Sample(tokens=tokens, tags=[tag.strip() for tag in tags])


def parse_image(fields: Mapping[str, Any]) -> Sample:
    """Returns the image, read from its file where the row names one, and its class."""
    image, label = collect(
        lambda: _image(fields.get("image")),
        lambda: _label(fields.get("label")),
    )
    return Sample(label=label, image=image)


def _image(image: Any) -> bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None or image in ("", b""):
        raise row_problem("missing", "has no image")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise row_problem("missing", f"has {json_type(image)} as image, neither a path nor bytes")
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise row_problem("image", f"names {image!r}, which cannot be read: {reason}") from error


def parse_translation(fields: Mapping[str, Any]) -> Sample:
    """Returns the texts of a row by their language."""
    found = fields.get("translation")
    if not isinstance(found, dict) or not found:
        what = "no" if found is None else f"{shortened(found)} as"
        raise row_problem("missing", f"has {what} translation, not texts by language")
    # Which of the languages are asked for is not known here; the others may be empty.
    return Sample(translation={str(name): text for name, text in found.items()})


def parse_speech(fields: Mapping[str, Any]) -> Sample:
    """Returns a recording and its transcript."""
    audio, (text,) = collect(
        lambda: _recording(fields.get("audio")),
        lambda: required_texts(fields, ["transcript"]),
    )
    return Sample(text=text, audio=audio)


def _recording(found: Any) -> Recording:
    if isinstance(found, Mapping) and ("bytes" in found or "path" in found):
        recording = Recording(found.get("path"), found.get("bytes"))
    else:
        recording = Recording(
            found if isinstance(found, str) else None, found if isinstance(found, bytes) else None
        )
    if recording.content is None and not recording.path:
        what = "no" if found in (None, "") else f"{shortened(found)}, neither a path nor a file, as"
        raise row_problem("audio", f"has {what} audio")
    return recording
