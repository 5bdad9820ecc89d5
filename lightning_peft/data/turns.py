"""Parsing of turns in ChatML and ShareGPT format, and of reasoning in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from lightning_peft.data.cells import literal_value
from lightning_peft.data.samples import Message, RowProblems, row_problem, shortened
from lightning_peft.data.template_context import is_empty, json_value, read_calls

Reasoning = Literal["train", "mask", "strip"]

# The first is what most chat templates read, and what a turn holds here.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Types of parts of a content that are thoughts.
REASONING_PART_TYPES = ("thinking", "reasoning")
_NAMES = "think|thinking|thought|reasoning"
# At the start of an answer. Where the opening mark is in the prompt, the closing one is alone.
_INLINE = re.compile(
    rf"\A\s*(?:<(?P<name>{_NAMES})>(?P<body>.*?)</(?P=name)>"
    r"|\[THINK\](?P<mistral>.*?)\[/THINK\]|(?P<rest>.*?)</think>)\s*",
    re.DOTALL,
)
_OPENING = re.compile(rf"\s*(?:<(?:{_NAMES})>|\[THINK\])")

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "developer": "system"},
    **dict.fromkeys(("gpt", "model", "ai", "bot", "chatgpt"), "assistant"),
    **dict.fromkeys(("observation", "function", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
# Turns whose content is the call itself, as JSON.
_CALLING = ("function_call", "tool_call")
# Whether a turn is trained, as OpenAI, axolotl and ms-swift write it.
FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
_TEXT_PARTS = ("text", "input_text", "output_text")
WEIGHT_HINT = "it is trained (1) or not (0), as the loss is one mean over tokens of equal weight"


def inline_reasoning(message: Message) -> re.Match[str] | None:
    """Returns the thoughts that the content of an answer begins with, marks and all."""
    return _INLINE.match(message["content"]) if message["role"] == "assistant" else None


def unclosed_reasoning(message: Message) -> bool:
    """Returns whether an answer begins thoughts that do not end, as one that was cut off does."""
    begins = message["role"] == "assistant" and _OPENING.match(message["content"])
    return bool(begins) and inline_reasoning(message) is None


def reasoning_texts(message: Message) -> list[str]:
    """Returns the thoughts of a turn without their marks, stripped; empty ones are not there."""
    found = inline_reasoning(message)
    inside = found.group("body", "mistral", "rest") if found else ()
    written = [message.get(REASONING_KEYS[0]), *inside]
    return [text.strip() for text in written if isinstance(text, str) and text.strip()]


def merge_reasoning(message: Message) -> Message | None:
    """Returns an answer whose thoughts stand in their key alone; ``None`` if two differ."""
    thought, found = message.get(REASONING_KEYS[0]), inline_reasoning(message)
    if not thought or found is None:
        return message
    inside = next(text for text in found.group("body", "mistral", "rest") if text is not None)
    if inside.strip() not in ("", thought.strip()):
        return None
    return {**message, "content": message["content"][found.end() :]}


def strip_reasoning(message: Message) -> Message:
    """Returns a turn without its thoughts."""
    if message["role"] != "assistant":
        return message
    rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    found = inline_reasoning(rest)
    return {**rest, "content": rest["content"][found.end() :]} if found else rest


def replace_reasoning(message: Message, body: str, text: str) -> Message:
    """Returns a turn with ``text`` in place of ``body``, one of :func:`reasoning_texts`."""
    key = message.get(REASONING_KEYS[0])
    if isinstance(key, str) and key.strip() == body:
        return {**message, REASONING_KEYS[0]: text}
    return {**message, "content": message["content"].replace(body, text, 1)}


def template_message(message: Mapping[str, Any]) -> Message:
    """Returns a turn as chat templates read it, its thoughts under each of their names."""
    turn = {key: value for key, value in message.items() if key != "train"}
    if turn.get(REASONING_KEYS[0]):
        turn = {**dict.fromkeys(REASONING_KEYS, turn[REASONING_KEYS[0]]), **turn}
    return turn


def read_turn(turn: Any, place: str) -> tuple[Message, list[str]]:
    """Returns a turn, and the keys in it that nothing reads; others are for the chat template."""
    if not isinstance(turn, dict):
        raise row_problem("missing", f"{place} is {shortened(turn)}, not an object")
    keys = {key: value for key, value in turn.items() if not is_empty(value)}
    role = _pop_alias(keys, ("role", "from"), place)
    if role is None:
        names = ", ".join(turn)
        raise row_problem("roles", f"{place} has no role (or from); its keys are {names or 'none'}")
    role = role.strip().lower() if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise row_problem("roles", f"{place} has the role {shortened(role)}; roles are {known}")
    content = _pop_alias(keys, ("content", "value"), place)
    problems: list[tuple[str, str]] = []
    calls = _calls(keys, place, problems)
    if role in _CALLING:
        calls, content = read_calls(content, place), None
    thoughts: list[Any] = []
    unused: list[str] = []
    if isinstance(content, list):
        content, thoughts, unused = _join_parts(content, place)
    if ROLES[role] == "assistant":
        thoughts += [keys.pop(key) for key in REASONING_KEYS if key in keys]
    if content is None and calls:
        content = ""
    if ROLES[role] != "tool" and _are_printed_parts(content):
        raise row_problem("missing", f"{place} has the parts of its content as text: write a list")
    name = f"{place} ({role})"
    if thoughts and ROLES[role] != "assistant":
        problems.append(("thoughts", f"{name} has thoughts as a part of its content"))
    # Whether a turn without text is empty depends on its calls.
    if not problems and not isinstance(content, str):
        problems.append(("missing", f"{name} has no text as content"))
    elif not problems and not content.strip() and not calls:
        problems.append(("missing", f"{name} is empty"))
    message: Message = {"role": ROLES[role], "content": content}
    thought = _single_reasoning(thoughts, name, problems)
    if thought:
        message[REASONING_KEYS[0]] = thought
        settled = merge_reasoning(message) if isinstance(content, str) else message
        if settled is None:
            problems.append(("thoughts", f"{name} has other thoughts in its text than in a key"))
        elif not problems and not settled["content"].strip() and not calls:
            problems.append(("missing", f"{name} is empty besides its thoughts"))
        message = settled or message
    if calls:
        message["tool_calls"] = calls
    flag = _train_flag(keys, message["role"], name, problems)
    if flag is False and message["role"] == "assistant":
        message["train"] = False
    if problems:
        raise RowProblems(problems)
    return {**message, **keys}, unused


def _pop_alias(keys: dict[str, Any], names: tuple[str, ...], place: str) -> Any:
    """Takes the one of two keys that is there."""
    found = [keys.pop(name) for name in names if name in keys]
    if len(found) > 1 and found[0] != found[1]:
        both = " and another text as ".join(names)
        raise row_problem("missing", f"{place} has one text as {both}")
    return found[0] if found else None


def _calls(
    keys: dict[str, Any], place: str, problems: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    try:
        calls += read_calls(keys.pop("tool_calls", None), place)
        # OpenAI's older spelling of one call.
        calls += read_calls(keys.pop("function_call", None), place)
    except RowProblems as error:
        problems += error.problems
    return calls


def _join_parts(parts: list[Any], place: str) -> tuple[str, list[Any], list[str]]:
    """Returns text, thoughts, and keys that nothing reads, of a content in parts."""
    text = ""
    thoughts: list[Any] = []
    unused: list[str] = []
    not_text: list[Any] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        used = {"type", "text"}
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in REASONING_PART_TYPES and not text.strip():
            used |= {kind}
            found = part.get(kind, part.get("text"))
            # Mistral writes the thoughts of a part as a list of parts.
            thoughts += found if isinstance(found, list) else [{"text": found}]
        else:
            not_text.append(part)
        if isinstance(part, dict):
            unused += [f"content[].{key}" for key in part if key not in used]
    if not_text:
        shown = shortened(not_text)
        raise row_problem("missing", f"{place} holds parts that are not text: {shown}")
    return text, [thoughts] if thoughts else [], list(dict.fromkeys(unused))


def _are_printed_parts(content: Any) -> bool:
    """Returns whether a text is a list of parts, as a column of texts holds it."""
    if not isinstance(content, str) or not content.startswith(("[{", "[ {")):
        return False
    value, problem = literal_value(content)
    return problem is None and all(
        isinstance(part, dict) and part.get("type") in (*_TEXT_PARTS, *REASONING_PART_TYPES)
        for part in value
    )


def _single_reasoning(found: list[Any], name: str, problems: list[tuple[str, str]]) -> str:
    texts = []
    for one in found:
        inner = one if isinstance(one, list) else [{"text": one}]
        pieces = [part.get("text") if isinstance(part, Mapping) else None for part in inner]
        if not all(isinstance(piece, str) for piece in pieces):
            problems.append(("thoughts", f"{name} has {shortened(one)} as thoughts, not text"))
            return ""
        texts.append("".join(pieces))  # type: ignore[arg-type]
    different = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(different) > 1:
        shown = " and ".join(map(shortened, different[:2]))
        problems.append(("thoughts", f"{name} has several thoughts under several keys: {shown}"))
    return different[0] if different else ""


def _train_flag(
    keys: dict[str, Any], role: str, name: str, problems: list[tuple[str, str]]
) -> bool | None:
    """Returns whether a turn is trained by its own flags; ``None`` without any."""
    flags = {key: keys.pop(key) for key in FLAGS if key in keys}
    states = {key: parse_flag(value) for key, value in flags.items()}
    for key in [key for key, on in states.items() if on is None]:
        problems.append(("weight", f"{name} has {key}={shortened(flags[key])}: {WEIGHT_HINT}"))
    answers = {on for on in states.values() if on is not None}
    if len(answers) > 1:
        shown = ", ".join(f"{key}={value!r}" for key, value in flags.items())
        problems.append(("weight", f"{name} has {shown}, which contradict each other"))
    if True in answers and role != "assistant":
        key = next(key for key, on in states.items() if on)
        shown = f"{key}={flags[key]!r}"
        problems.append(("weight", f"{name} has {shown}, and assistant turns alone are trained"))
    return next(iter(answers)) if len(answers) == 1 else None


def parse_flag(value: Any) -> bool | None:
    """Returns whether a weight or flag is on or off; ``None`` for all between and beyond."""
    value = json_value(value.strip().lower()) if isinstance(value, str) else value
    # True and 1.0 equal 1.
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None
