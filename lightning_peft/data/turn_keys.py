"""Keys of turns that the chat template ignores: reported, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from lightning_peft.data.conversation_text import ConversationText
from lightning_peft.data.samples import Message, shortened
from lightning_peft.data.turns import FLAGS, REASONING_KEYS
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import similar_names

Rendered = Callable[[Sequence[Message], Mapping[str, Any]], object]
# A place of a turn, a key, and turns and context without that key.
_Variant = tuple[int | None, str, Sequence[Message], Mapping[str, Any]]
# Keys of every turn; `train` is about the loss, not the text.
_ALWAYS = ("role", "content", "train")
_NAME = "tool_calls[].function.name"
# Content of an answer, or what it answers, other than its text.
_CONTENT_KEYS = frozenset(
    (
        *("tool_calls", _NAME, "tool_calls[].function.arguments"),
        *("image", "images", "image_url", "audio", "audios", "video", "videos", "file", "files"),
        *("refusal", "tool_plan", "tools", "functions", "documents", "tool_responses"),
    )
)
# Which parts of a turn are trained, or with what weight.
_LOSS_KEYS = frozenset(
    (
        *("train_detail", "training_detail", "loss_scale", "loss_weight", "weights", "loss_mask"),
        *("mask", "masked", "token_weights", "train_on_turn", "trained", "is_trained"),
        *("learn", "learnable", "ignore", "ignore_loss", "supervised", "no_loss", "compute_loss"),
    )
)
_REQUIRED_TOOL_KEYS = ("tools[].function.name", "tools[].function.parameters")
_KNOWN = (*REASONING_KEYS, *FLAGS, "tool_calls", "tool_call_id", "function_call")


def keys_without_effect(
    rendered: Rendered,
    messages: Sequence[Message],
    context: Mapping[str, Any],
    of_tools: bool = False,
) -> Iterator[tuple[int | None, str]]:
    """Yields every key without which the same is rendered, with the place of its turn if any."""
    whole: object = None
    variants = _without_one_tool_key if of_tools else _without_one_key
    for place, key, turns, reduced in variants(messages, context):
        whole = rendered(messages, context) if whole is None else whole
        try:
            if rendered(turns, reduced) == whole:
                yield place, key
        except EncodingProblem:
            # A template that fails without a key reads it.
            continue


def _without_one_key(messages: Sequence[Message], context: Mapping[str, Any]) -> Iterator[_Variant]:
    for place, turn in enumerate(messages):
        reduced = [(key, _without(turn, key)) for key in turn if key not in _ALWAYS]
        calls = turn.get("tool_calls", [])
        for number, call in enumerate(calls):
            for key, fewer in _calls_without_one_key(call):
                changed = {**turn, "tool_calls": _replaced(calls, number, fewer)}
                reduced.append((f"tool_calls[].{key}", changed))
        for key, changed in reduced:
            yield place, key, _replaced(messages, place, changed), context
    for name in context:
        yield None, name, messages, _without(context, name)


def _calls_without_one_key(call: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    # The type is implied by the rest.
    yield from ((k, _without(call, k)) for k in call if k not in ("function", "type"))
    function = call["function"]
    for key in filter(function.get, function):
        yield f"function.{key}", {**call, "function": _without(function, key)}


def _without_one_tool_key(
    messages: Sequence[Message], context: Mapping[str, Any]
) -> Iterator[_Variant]:
    for place, tool in enumerate(context["tools"]):
        function = tool.get("function")
        for key in function if isinstance(function, dict) else ():
            fewer = {**tool, "function": _without(function, key)}
            tools = _replaced(context["tools"], place, fewer)
            yield None, f"tools[].function.{key}", messages, {**context, "tools": tools}


def _without(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}


def _replaced(items: Sequence[Any], place: int, item: Any) -> list[Any]:
    return [*items[:place], item, *items[place + 1 :]]


class TurnKeys:
    """Checks the keys of conversations against the output of their chat template."""

    def __init__(self, texts: ConversationText) -> None:
        self.texts = texts
        # Rows share their tools, of which a long list takes many renderings.
        self._tools: dict[str, list[str]] = {}

    def unused(self, messages: Sequence[Message], context: Mapping[str, Any]) -> list[str]:
        """Returns the keys without an effect on the rendered text; refuses the others."""
        messages = self.texts.turns(messages, context)
        name = self.texts.rendering.template.name
        problems, named = [], []
        for place, key in keys_without_effect(self._rendered, messages, context):
            if place is None:
                problems += self._context_problems(key, context[key])
                continue
            if key == _NAME and len(context.get("tools", ())) == 1:
                # Which tool is called goes without saying.
                continue
            reason = _refusal(key, messages[place])
            if reason is None:
                named.append(f"messages[].{key}")
            else:
                shown = shortened(messages[place][key]) if key in messages[place] else ""
                what = f"{key}={shown}" if shown else key
                problems.append(f"{what} in turn {place + 1}{reason}")
        if "tools" in context and not problems:
            tool_keys = self._tool_keys(messages, context)
            problems += [f"{key} of its tools" for key in tool_keys if key in _REQUIRED_TOOL_KEYS]
            named += [key for key in tool_keys if key not in _REQUIRED_TOOL_KEYS]
        if problems:
            listed = ", ".join(dict.fromkeys(problems))
            raise EncodingProblem(
                "key", f"has {listed}: the chat template {name} writes none of it"
            )
        return list(dict.fromkeys(named))

    def _rendered(self, messages: Sequence[Message], context: Mapping[str, Any]) -> object:
        return [part.text for part in self.texts.parts(messages, context)]

    def _context_problems(self, key: str, value: Any) -> list[str]:
        variables = self.texts.rendering.variables
        if key in variables:
            # Such as `enable_thinking` with the value that it has anyway.
            return []
        if key in ("tools", "documents"):
            return [key]
        return [f"{key}={shortened(value)} in chat_template_kwargs{similar_names(key, variables)}"]

    def _tool_keys(self, messages: Sequence[Message], context: Mapping[str, Any]) -> list[str]:
        key = json.dumps(context["tools"], sort_keys=True)
        if key not in self._tools:
            found = keys_without_effect(self._rendered, messages, context, of_tools=True)
            self._tools[key] = list(dict.fromkeys(path for _, path in found))
        return self._tools[key]


def _refusal(key: str, turn: Message) -> str | None:
    """Returns why a key cannot be left out, as the end of a phrase; ``None`` where it can."""
    if key in _CONTENT_KEYS or key in _LOSS_KEYS:
        return ""
    if key == "channel" and turn[key] != "final":
        # Thoughts, or a call, as gpt-oss writes them.
        return ""
    if key in (*REASONING_KEYS, "tool_call_id") or "[]" in key:
        return None
    near = get_close_matches(key.strip().lower(), _KNOWN, n=1, cutoff=0.8)
    return f" (nearest key that is read: {near[0]!r})" if near else None
