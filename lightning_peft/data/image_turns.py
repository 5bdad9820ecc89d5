"""Parsing of conversations with images: positions and image files."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from lightning_peft.data.conversations import listed_turns, parse_messages, parse_pair
from lightning_peft.data.samples import (
    Sample,
    collect,
    read_image,
    row_problem,
    shortened,
)
from lightning_peft.data.template_context import is_empty, json_value

# Stands for an image in the text of a turn; Unicode has it for such objects.
MARK = "\ufffc"
# What stands for an image in turns that are text, next to a column of images.
PLACEHOLDER = "<image>"
_IMAGE_PARTS = ("image", "image_url", "input_image")
# Keys of such a part that may hold the image or its path, in this order.
_PART_KEYS = ("image", "image_url", "path", "url", "bytes", "base64", "source")
# Keys of the bytes of an image, which are base64 where they are text.
_BASE64_KEYS = ("bytes", "base64", "data")
_CONTENT_KEYS = ("content", "value")


def parse_image_messages(fields: Mapping[str, Any]) -> Sample:
    """Returns the turns of a row, with a mark for each image, and the images."""
    return _parse(fields, ("messages",), parse_messages)


def parse_image_pair(fields: Mapping[str, Any]) -> Sample:
    """Returns a prompt and its completion as turns, with their images."""
    return _parse(fields, ("prompt", "completion"), parse_pair)


def _parse(
    fields: Mapping[str, Any], names: tuple[str, ...], parse: Callable[[Mapping[str, Any]], Sample]
) -> Sample:
    column = _listed(fields.get("images"))
    sources: list[Any] = []
    rest = {name: value for name, value in fields.items() if name != "images"}
    marked, images = collect(
        lambda: {name: _marked(fields[name], sources) for name in names if name in fields},
        lambda: column,
    )
    sample, content, _ = collect(
        lambda: parse({**rest, **marked}),
        lambda: collect(*(partial(_read, one) for one in _matched(sources, images))),
        lambda: _refuse_placeholders(fields, names) if sources or images else None,
    )
    if images and not sources:
        # As TRL does: without a place of their own, images come before the first question.
        sample = _with_images_first(sample, len(content))
    speaking = [i for i, turn in enumerate(sample.messages, 1) if MARK in turn["content"]]
    learnt = [i for i in speaking if sample.messages[i - 1]["role"] == "assistant"]
    if learnt:
        raise row_problem(
            "image", f"has an image in turn {learnt[0]} (assistant), and text alone is learnt"
        )
    return replace(sample, images=tuple(content))


def _listed(value: Any) -> list[Any]:
    found = json_value(value)
    if is_empty(found):
        return []
    return found if isinstance(found, list) else [found]


def _with_images_first(sample: Sample, count: int) -> Sample:
    turns = list(sample.messages)
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
    turns[first] = {**turns[first], "content": MARK * count + turns[first]["content"]}
    return replace(sample, messages=turns)


def _matched(sources: list[Any], column: list[Any]) -> list[Any]:
    """Returns the image of each place; those without take the column's, perhaps by ``index``."""
    if not sources:
        return column
    waiting = [one for one in sources if isinstance(one, _Place)]
    if not waiting and not column:
        return sources
    if len(waiting) != len(column):
        raise row_problem(
            "image",
            f"has {len(waiting)} places for images in its turns and {len(column)} images in its "
            "column",
        )
    order = [place if one.index is None else one.index for place, one in enumerate(waiting)]
    if sorted(order) != list(range(len(column))):
        raise row_problem("image", f"has images by the index {order} of {len(column)}")
    following = iter([column[index] for index in order])
    return [next(following) if isinstance(one, _Place) else one for one in sources]


class _Place:
    """A place for an image of the column."""

    def __init__(self, index: int | None = None) -> None:
        self.index = index


def _refuse_placeholders(fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Refuses places for images in the texts of parts, where an image is a part of its own."""
    turns = [turn for name in names for turn in listed_turns(fields.get(name)) or []]
    for turn in turns:
        key = _content_key(turn)
        content = None if key is None else turn[key]
        for part in content if isinstance(content, list) else []:
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str) and PLACEHOLDER in text:
                raise row_problem(
                    "image",
                    f"has {PLACEHOLDER} in a text that is a part of a list ({shortened(text)}): "
                    "an image is a part of its own there",
                )


def _marked(value: Any, sources: list[Any]) -> Any:
    """Returns turns, or a text, with marks for images; what they are is added to ``sources``."""
    text, part = partial(_marked_text, sources=sources), partial(_marked_part, sources=sources)
    turns = listed_turns(value)
    return text(value) if turns is None else [_changed_content(turn, text, part) for turn in turns]


def _content_key(turn: Any) -> str | None:
    names = _CONTENT_KEYS if isinstance(turn, dict) else ()
    return next((name for name in names if name in turn), None)


def _changed_content(turn: Any, text: Callable[[str], Any], part: Callable[[Any], Any]) -> Any:
    """Returns a turn whose content, a text or a list of parts, is changed."""
    key = _content_key(turn)
    content = None if key is None else turn[key]
    if isinstance(content, str):
        return {**turn, key: text(content)}
    return {**turn, key: list(map(part, content))} if isinstance(content, list) else turn


def _marked_text(text: Any, sources: list[Any]) -> Any:
    if not isinstance(text, str):
        return text
    _refuse_mark(text)
    sources += [_Place() for _ in range(text.count(PLACEHOLDER))]
    return text.replace(PLACEHOLDER, MARK)


def _marked_part(part: Any, sources: list[Any]) -> Any:
    if not isinstance(part, dict):
        return part
    if part.get("type") not in _IMAGE_PARTS:
        if isinstance(part.get("text"), str):
            _refuse_mark(part["text"])
        # Tables of parts of two kinds have the keys of both.
        return {name: one for name, one in part.items() if name != "index" and one is not None}
    key = next((name for name in _PART_KEYS if not is_empty(part.get(name))), None)
    held = None if key is None else part[key]
    if key in _BASE64_KEYS:
        held = {key: held}
    if isinstance(held, dict) and not is_empty(held.get("url")):
        # As OpenAI writes it.
        held = held["url"]
    index = part.get("index")
    sources.append(_Place(index if isinstance(index, int) else None) if held is None else held)
    return {"type": "text", "text": MARK}


def _refuse_mark(text: str) -> None:
    if MARK in text:
        raise row_problem(
            "control", "has the character U+FFFC in a text, which stands for an image"
        )


def _read(source: Any) -> bytes:
    if isinstance(source, dict):
        # Anthropic has the bytes as "data".
        coded = next((source[key] for key in _BASE64_KEYS if not is_empty(source.get(key))), None)
        if isinstance(coded, str):
            return _decoded(coded)
        source = source.get("path") if coded is None else coded
    if isinstance(source, str) and source.startswith("data:"):
        return _decoded(source)
    if isinstance(source, str) and is_address(source):
        raise row_problem(
            "image", f"names {shortened(source)}; images are read from files, so download it first"
        )
    return read_image(source)


def is_address(source: str) -> bool:
    """Whether a text is an address on the web, not a path."""
    return source.partition("://")[0].lower() in ("http", "https", "ftp", "s3", "gs")


def _decoded(text: str) -> bytes:
    coded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        # Lines of 76 characters, as in mails.
        return base64.b64decode("".join(coded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row_problem("image", f"has an image as base64 that cannot be read: {error}") from None


def with_paths(
    row: Mapping[str, Any], columns: Mapping[str, str], change: Callable[[str], str]
) -> dict[str, Any]:
    """Returns a row with every path of an image changed; ``columns`` are our names to the row's."""
    changed = dict(row)
    for ours, name in columns.items():
        if ours == "images":
            changed[name] = _changed_cells(row.get(name), change)
        elif (turns := listed_turns(row.get(name))) is not None:
            part = partial(_changed_part, change=change)
            changed[name] = [_changed_content(turn, str, part) for turn in turns]
    return changed


def _changed_cells(cell: Any, change: Callable[[str], str]) -> Any:
    value = json_value(cell)
    if isinstance(value, list):
        return [_changed_cell(one, change) for one in value]
    return _changed_cell(value, change)


def _changed_cell(cell: Any, change: Callable[[str], str]) -> Any:
    if isinstance(cell, dict) and not cell.get("bytes") and isinstance(cell.get("path"), str):
        return {**cell, "path": _changed_cell(cell["path"], change)}
    if not isinstance(cell, str) or not cell.strip():
        return cell
    if cell.startswith("data:") or is_address(cell):
        return cell
    if cell.lower().startswith("file://"):
        return change(url2pathname(urlsplit(cell).path))
    return change(cell)


def _changed_part(part: Any, change: Callable[[str], str]) -> Any:
    if not isinstance(part, dict) or part.get("type") not in _IMAGE_PARTS:
        return part
    changed = dict(part)
    for key in ("image", "path", "url", "image_url", "source"):
        value = part.get(key)
        if isinstance(value, dict) and isinstance(value.get("url"), str):
            changed[key] = {**value, "url": _changed_cell(value["url"], change)}
        elif not is_empty(value):
            changed[key] = _changed_cell(value, change)
    return changed
