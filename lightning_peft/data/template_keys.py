"""Which keys of a conversation its chat template writes: rendered with each of them and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning_peft.data.samples import Message
from lightning_peft.data.validation import EncodingProblem

Rendered = Callable[[Sequence[Message], Mapping[str, Any]], object]
# Keys of every turn; `train` is about the loss, not the text.
_ALWAYS = ("role", "content", "train")
# Keys of tools and calls that are implied by the rest.
_KINDS = ("type",)


def keys_without_effect(
    rendered: Rendered, messages: Sequence[Message], context: Mapping[str, Any]
) -> Iterator[tuple[int | None, str]]:
    """Yields every key without which the same is rendered, with the place of its turn.

    ``rendered`` is called with turns and context; keys of the context have ``None`` as place.
    """
    whole: object = None

    def renders_same(turns: Sequence[Message], reduced_context: Mapping[str, Any]) -> bool:
        nonlocal whole
        whole = rendered(messages, context) if whole is None else whole
        try:
            return rendered(turns, reduced_context) == whole
        except EncodingProblem:
            # A template that fails without a key reads it.
            return False

    for place, turn in enumerate(messages):
        for path, reduced in _turns_without_one_key(turn):
            if renders_same([*messages[:place], reduced, *messages[place + 1 :]], context):
                yield place, path
    for name in context:
        if renders_same(messages, {key: context[key] for key in context if key != name}):
            yield None, name


def tool_keys_without_effect(
    rendered: Rendered, messages: Sequence[Message], context: Mapping[str, Any]
) -> list[str]:
    """Returns the keys of the tools in ``context`` without which the same is rendered."""
    whole = rendered(messages, context)
    found = []
    for path, fewer in _tools_without_one_key(context["tools"]):
        try:
            if rendered(messages, {**context, "tools": fewer}) == whole:
                found.append(path)
        except EncodingProblem:
            continue
    return list(dict.fromkeys(found))


def _turns_without_one_key(turn: Message) -> Iterator[tuple[str, Message]]:
    for key in turn:
        if key not in _ALWAYS:
            yield key, {name: turn[name] for name in turn if name != key}
    calls = turn.get("tool_calls", [])
    for place, call in enumerate(calls):
        for path, reduced in _calls_without_one_key(call):
            yield (
                f"tool_calls[].{path}",
                {
                    **turn,
                    "tool_calls": [*calls[:place], reduced, *calls[place + 1 :]],
                },
            )


def _calls_without_one_key(call: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in call:
        if key != "function" and key not in _KINDS:
            yield key, {name: call[name] for name in call if name != key}
    function = call["function"]
    for key in function:
        if function[key]:
            reduced = {name: function[name] for name in function if name != key}
            yield f"function.{key}", {**call, "function": reduced}


def _tools_without_one_key(tools: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    for place, tool in enumerate(tools):
        function = tool.get("function")
        for key in function if isinstance(function, dict) else ():
            reduced = {name: function[name] for name in function if name != key}
            yield (
                f"tools[].function.{key}",
                [*tools[:place], {**tool, "function": reduced}, *tools[place + 1 :]],
            )
