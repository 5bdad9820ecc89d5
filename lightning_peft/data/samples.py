"""What a row says: its turns or text, read from the fields of the row's shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_peft.data.audio import Recording

Message = dict[str, Any]
_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "developer": "system", "observation": "tool"},
}


@dataclass(frozen=True)
class Sample:
    """What a row says, in one form for all shapes.

    Attributes:
        messages: Turns with ``role`` and ``content``; empty for plain text.
        rejected: The turns that are not preferred, for preference data.
        text: Plain text.
        label: The class of the text or image.
        text_pair: The second of two texts that are classified together.
        tokens: Words, each with a tag.
        tags: The tags of the words.
        image: The bytes of an image file.
        translation: Language to text, where a row says the same in several.
        audio: What ``text`` is said in.
    """

    messages: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    text: str | None = None
    label: str | None = None
    text_pair: str | None = None
    tokens: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    image: bytes | None = None
    translation: dict[str, str] | None = None
    audio: Recording | None = None

    def digest(self) -> bytes:
        """Returns 16 bytes that are the same exactly for rows that say the same.

        Images are the same whatever their label: neither a second label nor a place in two splits
        goes unnoticed then.
        """
        if self.image is not None:
            return hashlib.sha256(self.image).digest()[:16]
        content: list[Any] = [self.messages, self.rejected, self.text, self.label]
        # Only where there is one, so that rows of other shapes keep their digest and their split.
        if self.text_pair is not None:
            content.append({"text_pair": self.text_pair})
        if self.tokens:
            content.append({"tokens": self.tokens, "tags": self.tags})
        sound = self.audio and self.audio.digest()
        return _digest([*content, *filter(None, [self.translation, sound])])

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
        if self.label is not None:
            return _digest([self.text, self.text_pair])
        return _digest(self.messages[:-1]) if self.messages else None


def _digest(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    # surrogatepass: JSON may hold halves of characters, which are no valid UTF-8.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class RowProblems(Exception):
    """Ends the parsing of one row with all of its problems, as ``(kind, problem)``."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems


def _text(fields: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    problems, texts = [], []
    for name in names:
        value = fields.get(name)
        if value is None:
            problems.append(("missing", f"has no {name}"))
        elif not isinstance(value, str):
            kind = type(value).__name__
            problems.append(("missing", f"has a {kind} as {name}, not text: {_short(value)}"))
        elif not value.strip():
            problems.append(("missing", f"has an empty {name}"))
        else:
            texts.append(value)
    if problems:
        raise RowProblems(problems)
    return texts


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _system(fields: Mapping[str, Any]) -> list[Message]:
    if fields.get("system") in (None, ""):
        return []
    return [{"role": "system", "content": _text(fields, ["system"])[0]}]


def _messages(turns: Any, name: str = "messages") -> list[Message]:
    if not isinstance(turns, list) or not turns:
        what = "no" if turns is None else "an empty" if turns == [] else "no list in"
        raise RowProblems([("missing", f"has {what} {name}")])
    found, problems = [], []
    for place, turn in enumerate(turns, start=1):
        try:
            found.append(_message(turn, f"turn {place} of {name}"))
        except RowProblems as error:
            problems += error.problems
    if problems:
        raise RowProblems(problems)
    return found


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise RowProblems([("missing", f"{place} is {_short(turn)}, not an object")])
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise RowProblems([("roles", f"{place} has the role {_short(role)}; roles are {known}")])
    calls = turn.get("tool_calls")
    if isinstance(content, list):
        content = _joined(content, place)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RowProblems([("missing", f"{place} ({role}) has no text as content")])
    if not content.strip() and not calls:
        raise RowProblems([("missing", f"{place} ({role}) is empty")])
    extra = {key: turn[key] for key in ("tool_calls", "name", "tool_call_id") if turn.get(key)}
    return {"role": _ROLES[role], "content": content, **extra}


def _joined(parts: list[Any], place: str) -> str:
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise RowProblems([("missing", f"{place} holds parts that are not text: {_short(parts)}")])
    return "".join(part["text"] for part in parts)


def order_problems(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Returns what is wrong with the order of roles in a conversation."""
    problems = []
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        problems.append(("roles", f"has a system turn at place {roles.index('system', 1) + 1}"))
    spoken = [role for role in roles if role != "system"]
    if spoken[:1] not in ([], ["user"]):
        problems.append(("roles", f"begins with {spoken[0]}, not with user"))
    for before, after in zip(spoken, spoken[1:], strict=False):
        if before == after != "tool":
            problems.append(("roles", f"has two {after} turns in a row"))
        if after == "tool" and before == "user":
            problems.append(("roles", "has a tool turn that no assistant turn asked for"))
    if roles[-1:] != ["assistant"]:
        end = roles[-1] if roles else "nothing"
        problems.append(("roles", f"ends with {end}: no assistant turn to learn at the end"))
    return list(dict.fromkeys(problems))


def _conversation(messages: list[Message]) -> list[Message]:
    problems = order_problems(messages)
    if problems:
        raise RowProblems(problems)
    return messages


def parse_messages(fields: Mapping[str, Any]) -> Sample:
    """Returns the turns of a row in ChatML or ShareGPT."""
    turns = _messages(fields.get("messages"))
    head = _system(fields) if turns[0]["role"] != "system" else []
    return Sample(_conversation(head + turns))


def _turns(value: Any, role: str, name: str) -> list[Message]:
    if isinstance(value, list):
        return _messages(value, name)
    return [{"role": role, "content": _text({name: value}, [name])[0]}]


def _all_of(*steps: Callable[[], Any]) -> list[Any]:
    # Every field is tried, so that all that is wrong with a row is told at once.
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


def parse_pair(fields: Mapping[str, Any]) -> Sample:
    """Returns a prompt and its completion as turns."""
    system, prompt, completion = _all_of(
        lambda: _system(fields),
        lambda: _turns(fields.get("prompt"), "user", "prompt"),
        lambda: _turns(fields.get("completion"), "assistant", "completion"),
    )
    return Sample(_conversation(system + prompt + completion))


def parse_alpaca(fields: Mapping[str, Any]) -> Sample:
    """Returns an instruction, with its input below it, and the output as turns."""
    given = fields.get("input")
    if given is not None and not isinstance(given, str):
        raise RowProblems([("missing", f"has a {type(given).__name__} as input, not text")])
    system, (instruction,), (output,) = _all_of(
        lambda: _system(fields),
        lambda: _turns(fields.get("instruction"), "user", "instruction"),
        lambda: _turns(fields.get("output"), "assistant", "output"),
    )
    if given and given.strip():
        instruction = {"role": "user", "content": f"{instruction['content']}\n\n{given}"}
    return Sample([*system, instruction, output])


def parse_preference(fields: Mapping[str, Any]) -> Sample:
    """Returns the turns with the chosen and with the rejected answer."""
    system, prompt, chosen, rejected = _all_of(
        lambda: _system(fields),
        lambda: _turns(fields["prompt"], "user", "prompt") if fields.get("prompt") else [],
        lambda: _turns(fields.get("chosen"), "assistant", "chosen"),
        lambda: _turns(fields.get("rejected"), "assistant", "rejected"),
    )
    if chosen[0]["role"] in ("system", "user"):
        # The answers hold the prompt as well, as in UltraFeedback.
        prompt = []
    if chosen == rejected:
        raise RowProblems([("preference", "has the same text as chosen and rejected")])
    if not prompt and chosen[:-1] != rejected[:-1]:
        raise RowProblems(
            [("preference", "has different turns before the last in the two answers")]
        )
    if not prompt and len(chosen) == 1:
        # Whole texts without turns: nothing says where the prompt ends.
        return Sample([*system, *chosen], [*system, *rejected])
    head = [*system, *prompt]
    return Sample(_conversation([*head, *chosen]), _conversation([*head, *rejected]))


def parse_text(fields: Mapping[str, Any]) -> Sample:
    """Returns plain text."""
    return Sample(text=_text(fields, ["text"])[0])


def _label(value: Any) -> str:
    """Returns the name of a class; a whole number is its own name until names are given."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowProblems([("missing", "has no label")])
    if isinstance(value, (list, dict)):
        raise RowProblems([("label", f"has {_short(value)} as label, and one label is trained")])
    if isinstance(value, float) and not value.is_integer():
        raise RowProblems([("label", f"has the label {value}; labels are names or whole numbers")])
    if isinstance(value, float):
        # Tables with a gap in a column of whole numbers hold floats.
        value = int(value)
    return str(value).strip()


def parse_label(fields: Mapping[str, Any]) -> Sample:
    """Returns a text, or two that belong together, and its class."""
    text, pair, label = _all_of(
        lambda: _text(fields, ["text"])[0],
        lambda: _text(fields, ["text_pair"])[0] if "text_pair" in fields else None,
        lambda: _label(fields.get("label")),
    )
    return Sample(text=text, text_pair=pair, label=label)


def _list_of(fields: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> list[str]:
    value, wanted = fields.get(name), " or ".join(kind.__name__ for kind in kinds)
    if value is None or value == []:
        raise RowProblems([("missing", f"has no {name}" if value is None else f"has empty {name}")])
    if not isinstance(value, list):
        raise RowProblems([("missing", f"has no list as {name}: {_short(value)}")])
    problems = [
        ("missing", f"has {_short(item)} as number {place} of its {name}, which is no {wanted}")
        for place, item in enumerate(value)
        # Python counts True among the numbers.
        if not isinstance(item, kinds) or isinstance(item, bool) or not str(item).strip()
    ]
    if problems:
        raise RowProblems(problems)
    return [str(item) for item in value]


def parse_tags(fields: Mapping[str, Any]) -> Sample:
    """Returns words and their tags."""
    tokens, tags = _all_of(
        lambda: _list_of(fields, "tokens", (str,)),
        lambda: _list_of(fields, "tags", (str, int)),
    )
    if len(tokens) != len(tags):
        raise RowProblems([("tags", f"has {len(tokens)} tokens and {len(tags)} tags")])
    return Sample(tokens=tokens, tags=[tag.strip() for tag in tags])


def parse_image(fields: Mapping[str, Any]) -> Sample:
    """Returns the image, read from its file where the row names one, and its class."""
    image, label = _all_of(
        lambda: _image(fields.get("image")),
        lambda: _label(fields.get("label")),
    )
    return Sample(label=label, image=image)


def _image(image: Any) -> bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None or image in ("", b""):
        raise RowProblems([("missing", "has no image")])
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        kind = type(image).__name__
        raise RowProblems([("missing", f"has a {kind} as image, neither a path nor bytes")])
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problem = f"names {image!r}, which cannot be read: {reason}"
        raise RowProblems([("image", problem)]) from error


def parse_source(fields: Mapping[str, Any]) -> Sample:
    """Returns a source as the user's turn, and its target as the answer."""
    source, target = _text(fields, ["source", "target"])
    return Sample(
        [{"role": "user", "content": source}, {"role": "assistant", "content": target}],
    )


def parse_translation(fields: Mapping[str, Any]) -> Sample:
    """Returns the texts of a row by their language."""
    found = fields.get("translation")
    if not isinstance(found, dict) or not found:
        what = "no" if found is None else f"{_short(found)} as"
        raise RowProblems([("missing", f"has {what} translation, not texts by language")])
    # Which of the languages are asked for is not known here; the others may be empty.
    return Sample(translation={str(name): text for name, text in found.items()})


def parse_speech(fields: Mapping[str, Any]) -> Sample:
    """Returns a recording and its transcript."""
    problems, found = [], fields.get("audio")
    if isinstance(found, Mapping) and ("bytes" in found or "path" in found):
        recording = Recording(found.get("path"), found.get("bytes"))
    else:
        recording = Recording(
            found if isinstance(found, str) else None, found if isinstance(found, bytes) else None
        )
    if recording.content is None and not recording.path:
        what = "no" if found in (None, "") else f"{_short(found)}, neither a path nor a file, as"
        problems.append(("audio", f"has {what} audio"))
    try:
        text = _text(fields, ["transcript"])[0]
    except RowProblems as error:
        problems += error.problems
    if problems:
        raise RowProblems(problems)
    return Sample(text=text, audio=recording)
