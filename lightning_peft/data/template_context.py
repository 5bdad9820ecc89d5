"""Variables of chat templates: tools, tool calls, documents and others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning_peft.data.samples import collect, row_problem, shortened

# Arguments of `apply_chat_template` that are not variables of a template, or set for each row.
RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "padding"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "truncation"),
        *("sanitize_control_tokens", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)


def _items(value: Any) -> list[Any] | None:
    """Returns a list, a single object as a list of one, or ``None`` for anything else."""
    found = json_value(value)
    if is_empty(found):
        return []
    if isinstance(found, Mapping):
        return [found]
    return found if isinstance(found, list) else None


def json_value(value: Any) -> Any:
    """Returns the value of a JSON string, or ``value`` itself where it is not one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def is_empty(value: Any) -> bool:
    """Returns whether a value is null, or an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def read_tools(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns tools as chat templates read them, ``{"type": "function", "function": {...}}``.

    A tool may be the function itself, with its ``name`` at the top, as in the older ``functions``.
    """
    found = _items(value)
    if found is None:
        raise row_problem("tools", f"has {shortened(value)} as {name}, not a list of tools")
    return collect(*(partial(_tool, one, place) for place, one in enumerate(found, start=1)))


def _tool(value: Any, place: int) -> dict[str, Any]:
    tool = json_value(value)
    if not isinstance(tool, dict) or not tool:
        raise row_problem("tools", f"has {shortened(value)} as tool {place}, not an object")
    # At the top: OpenAI's older `functions`, and its Responses API with a type next to it.
    bare = "function" not in tool and isinstance(tool.get("name"), str)
    if bare and tool.get("type", "function") == "function":
        inner = {key: value for key, value in tool.items() if key != "type"}
        return {"type": "function", "function": inner}
    return tool


def read_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Returns tool calls as chat templates read them, their arguments as objects."""
    found = _items(value)
    if found is None:
        raise row_problem("tools", f"{place} has {shortened(value)} as tool_calls, not a list")
    return collect(
        *(
            partial(_call, json_value(one), f"{place} has a tool call ({number})")
            for number, one in enumerate(found, start=1)
        )
    )


def _call(call: Any, what: str) -> dict[str, Any]:
    if isinstance(call, dict) and isinstance(call.get("name"), str) and "function" not in call:
        # Hermes, Mistral and ShareGPT write name and arguments at the top.
        inner = {key: call[key] for key in ("name", "arguments", "parameters") if key in call}
        others = {key: value for key, value in call.items() if key not in inner}
        call = {"type": "function", **others, "function": inner}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise row_problem("tools", f"{what} without the name of a function: {shortened(call)}")
    name = "arguments" if "arguments" in function else "parameters"
    raw = function.get(name)
    arguments = {} if raw is None or raw == "" else json_value(raw)
    if not isinstance(arguments, dict):
        raise row_problem(
            "tools", f"{what} whose arguments are not a JSON object: {shortened(raw)}"
        )
    rest = {key: value for key, value in function.items() if key != name}
    return {**call, "function": {**rest, "arguments": arguments}}


def read_context(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a row that the chat template gets, without empty ones."""
    tools, documents, variables = collect(
        lambda: read_tools(fields.get("tools"), "tools"),
        lambda: _documents(fields.get("documents")),
        lambda: _variables(fields.get("chat_template_kwargs")),
    )
    found = {"tools": tools, "documents": documents}
    return {**{name: value for name, value in found.items() if value}, **variables}


def _documents(value: Any) -> list[Any]:
    found = json_value(value)
    if is_empty(found):
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise row_problem("tools", f"has {shortened(value)} as documents, not a list of objects")
    return found


def _variables(value: Any) -> dict[str, Any]:
    found = json_value(value)
    if is_empty(found):
        return {}
    if not isinstance(found, dict):
        raise row_problem("tools", f"has {shortened(value)} as chat_template_kwargs, not an object")
    taken = reserved(found)
    if taken:
        raise row_problem(
            "tools", f"has {', '.join(taken)} in chat_template_kwargs, which encoding sets itself"
        )
    return {name: one for name, one in found.items() if one is not None}


def reserved(variables: Mapping[str, Any]) -> list[str]:
    """Returns the names that are arguments of encoding, not variables of a template."""
    return [name for name in variables if name in RESERVED]
