"""Samples: the parsed content of rows, and parsers of rows without turns."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_peft.data.audio import Recording
from lightning_peft.data.file_format import ClassName
from lightning_peft.data.json_text import json_type, texts_in

Message = dict[str, Any]

# Labels of answers that are wanted, and that are not.
DESIRABLE, UNDESIRABLE = "desirable", "undesirable"

# In characters.
_LONGEST_PATH = 500
# A sign within a number or before one, as in 1.5 or -3, and not at the end of a sentence.
_IN_NUMBER = re.compile(r"(?<=\d)\s*([!-/:-@\[-`{-~])\s*(?=\d)|(-)(?=\d)")
# Keys of the origin of a turn, not of its content.
METADATA_KEYS = {"id", "uuid", "date", "time", "timestamp", "created_at", "url"}


@dataclass(frozen=True)
class Sample:
    """The content of a row, in one form for all shapes.

    Attributes:
        messages: Turns with ``role`` and ``content``; empty for plain text. ``train`` is False for
            a turn that is not trained; other keys are for the chat template.
        rejected: The turns that are not preferred, for preference data.
        text: Plain text.
        label: The class of the text or image; with turns, whether the last one is wanted.
        text_pair: The second of two texts that are classified or compared together.
        negatives: Texts that do not belong to ``text``, as ``text_pair`` does.
        score: How well ``text`` and ``text_pair`` belong together.
        tokens: Words, each with a tag.
        tags: The tags of the words.
        image: The bytes of an image file.
        images: The bytes of the image files of a conversation, in the order of their places in it.
        translation: Language to text.
        audio: The recording of ``text``.
        context: Inputs of the chat template next to the turns: ``tools``, ``documents`` and
            variables of its own.
        prompt: What is answered, as the row has it: text or turns; where rewards are trained on.
        columns: Columns for reward functions, by name.
        unused: Keys of the row that nothing reads, such as ``id`` and ``messages[].date``.
    """

    messages: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    text: str | None = None
    label: str | None = None
    text_pair: str | None = None
    negatives: list[str] = field(default_factory=list)
    score: float | None = None
    tokens: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    image: bytes | None = None
    images: tuple[bytes, ...] = ()
    translation: dict[str, str] | None = None
    audio: Recording | None = None
    context: dict[str, Any] = field(default_factory=dict)
    prompt: Any = None
    columns: dict[str, Any] | None = None
    unused: tuple[str, ...] = ()

    def digest(self) -> bytes:
        """Returns 16 bytes that are equal exactly for rows of equal content.

        Images are the same whatever their label: a second one does not go unnoticed then.
        """
        if self.image is not None:
            return hashlib.sha256(self.image).digest()[:16]
        both = [_message_content(turns) for turns in (self.messages, self.rejected)]
        content: list[Any] = [*both, self.text, self.label]
        others: list[dict[str, Any]] = [
            {"text_pair": self.text_pair},
            {"negatives": self.negatives},
            {"score": self.score},
            {"tokens": self.tokens, "tags": self.tags},
            {"context": self.context},
            {"images": self._image_digests()},
            {"columns": self.columns},
        ]
        # Only where there is one, so that rows of other shapes keep their digest and their split.
        content += [one for one in others if next(iter(one.values())) not in (None, [], {})]
        sound = self.audio and self.audio.digest()
        return _digest([*content, *filter(None, [self.translation, sound])])

    def near_digest(self) -> bytes | None:
        """Returns 16 bytes that rows share whose texts differ in case, spaces and signs alone.

        ``None`` for rows without text, or whose images or recordings distinguish them.
        """
        if self.image is not None or self.images or self.audio is not None:
            return None
        turns = [*self.messages, *self.rejected]
        contents = [turn.get("content") for turn in turns]
        # Of calls, numbers count too.
        calls = [json.dumps(turn["tool_calls"]) for turn in turns if turn.get("tool_calls")]
        others = [self.text, self.text_pair, self.negatives, self.tokens, self.translation]
        text = _without_signs(" ".join(texts_in([*contents, *calls, *others])))
        return _digest(text) if text else None

    def with_system(self, prompt: str | None) -> Sample:
        """Returns the same with ``prompt`` as system turn, where there are turns and none."""
        if prompt is None or not self.messages or self.messages[0]["role"] == "system":
            return self
        first = {"role": "system", "content": prompt}
        rejected = [first, *self.rejected] if self.rejected else []
        return replace(self, messages=[first, *self.messages], rejected=rejected)

    def prompt_digest(self) -> bytes | None:
        """Returns 16 bytes for all turns but the last, or for what has labels, or ``None``."""
        if self.tokens:
            return _digest(self.tokens)
        if self.label is not None and not self.messages:
            return _digest([self.text, self.text_pair])
        if self.text_pair is not None:
            return _digest(self.text)
        if not self.messages:
            return None
        turns = self.messages[:-1] if self.prompt is None else self.messages
        prompt: list[Any] = _message_content(turns)
        if self.images:
            prompt = [*prompt, self._image_digests()]
        return _digest([prompt, self.context] if self.context else prompt)

    def _image_digests(self) -> list[str]:
        return [hashlib.sha256(image).hexdigest() for image in self.images]


class _Letters(dict[int, str]):
    """Characters by their codes, spaces in the place of other spaces and of signs."""

    def __missing__(self, code: int) -> str:
        # Marks are vowels in Hindi or Thai, and C++ and C# are other languages than C.
        kind, character = unicodedata.category(chr(code)), chr(code)
        is_sign = kind[0] in "ZP" or kind in ("So", "Sk", "Cc")
        self[code] = character if character == "#" or not is_sign else " "
        return self[code]


_LETTERS = _Letters()


def _without_signs(text: str) -> str:
    """Returns a text in lower case, one space for all spaces and signs that mean nothing."""
    # In a plane of its own, where a sign is not one.
    kept = _IN_NUMBER.sub(lambda found: chr(0xF0000 + ord(found[1] or found[2])), text)
    return " ".join(unicodedata.normalize("NFC", kept).casefold().translate(_LETTERS).split())


def _message_content(turns: Sequence[Message]) -> list[Message]:
    return [{key: turn[key] for key in turn if key not in METADATA_KEYS} for turn in turns]


def _digest(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=repr)
    # surrogatepass: JSON may hold halves of characters, which are not valid UTF-8.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class RowProblems(Exception):
    """Ends the parsing of one row with all of its problems, as ``(kind, problem)``."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems


def row_problem(kind: str, text: str) -> RowProblems:
    """Returns the problem of a row that has only this one."""
    return RowProblems([(kind, text)])


def required_texts(fields: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Returns the fields ``names``, each a text, or raises all that is wrong with them."""
    problems, texts = [], []
    for name in names:
        value = fields.get(name)
        if value is None:
            problems.append(("missing", f"has no {name}"))
        elif not isinstance(value, str):
            kind = json_type(value)
            problems.append(("missing", f"has {kind} as {name}, not text: {shortened(value)}"))
        elif not value.strip():
            problems.append(("missing", f"has an empty {name}"))
        else:
            texts.append(value)
    if problems:
        raise RowProblems(problems)
    return texts


def shortened(value: object) -> str:
    """Returns a value for a message."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def collect(*steps: Callable[[], Any]) -> list[Any]:
    """Returns the results of all steps, or raises the problems of all of them."""
    found: list[Any] = []
    problems = []
    for step in steps:
        try:
            found.append(step())
        except RowProblems as error:
            problems += error.problems
    if problems:
        raise RowProblems(problems)
    return found


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
    return _name_of(value)


def _name_of(value: Any) -> str:
    return value if isinstance(value, ClassName) else str(value).strip()


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
    return [_name_of(item) if int in kinds else item for item in value]


def parse_tags(fields: Mapping[str, Any]) -> Sample:
    """Returns words and their tags."""
    tokens, tags = collect(
        lambda: _list_of(fields, "tokens", (str,)),
        lambda: _list_of(fields, "tags", (str, int)),
    )
    if len(tokens) != len(tags):
        raise row_problem("tags", f"has {len(tokens)} tokens and {len(tags)} tags")
    return Sample(tokens=tokens, tags=tags)


def parse_image(fields: Mapping[str, Any]) -> Sample:
    """Returns the image, read from its file where the row names one, and its class."""
    image, label = collect(
        lambda: read_image(fields.get("image")),
        lambda: _label(fields.get("label")),
    )
    return Sample(label=label, image=image)


def read_image(image: Any) -> bytes:
    """Returns the bytes of an image file, of a cell that holds them or names the file."""
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
        # The end of a path says most, unless it is not one.
        long = len(image) > _LONGEST_PATH
        shown = f"{shortened(image)} (base64 begins with data:;base64,)" if long else repr(image)
        raise row_problem("image", f"names {shown}, which cannot be read: {reason}") from error


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
