"""Tools and tool calls of a conversation, in the form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_peft.data.samples import RowProblems, shortened


def _items(value: Any) -> list[Any] | None:
    """Returns a list, a single object as a list of one, or ``None`` for anything else."""
    found = json_value(value)
    if is_empty(found):
        return []
    if isinstance(found, Mapping):
        return [found]
    return found if isinstance(found, list) else None


def json_value(value: Any) -> Any:
    """Returns what a JSON string holds, or ``value`` itself where it is not one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def is_empty(value: Any) -> bool:
    """Says whether a key with this value says nothing: null, or empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def read_tools(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns tools as chat templates read them, ``{"type": "function", "function": {...}}``.

    Args:
        value: A list of tools, or JSON text of one. A tool may be the function itself, with its
            ``name`` at the top, as in the older ``functions``.
        name: What the column is called.

    Raises:
        RowProblems: If it is something else.
    """
    found = _items(value)
    if found is None:
        raise RowProblems([("tools", f"has {shortened(value)} as {name}, not a list of tools")])
    tools, problems = [], []
    for place, one in enumerate(found, start=1):
        tool = json_value(one)
        if not isinstance(tool, dict) or not tool:
            problems.append(("tools", f"has {shortened(one)} as tool {place}, not an object"))
        else:
            tools.append(_wrapped(tool))
    if problems:
        raise RowProblems(problems)
    return tools


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    # At the top: OpenAI's older `functions`, and its Responses API with a type next to it.
    bare = "function" not in tool and isinstance(tool.get("name"), str)
    if bare and tool.get("type", "function") == "function":
        inner = {key: value for key, value in tool.items() if key != "type"}
        return {"type": "function", "function": inner}
    return tool


def read_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Returns tool calls as chat templates read them, their arguments as objects.

    Args:
        value: A list of calls, or JSON text of one.
        place: Which turn it is, for messages.

    Raises:
        RowProblems: If it is something else, or arguments are not JSON objects.
    """
    found = _items(value)
    if found is None:
        raise RowProblems([("tools", f"{place} has {shortened(value)} as tool_calls, not a list")])
    calls, problems = [], []
    for number, one in enumerate(found, start=1):
        try:
            calls.append(_call(json_value(one), f"{place} has a tool call ({number})"))
        except RowProblems as error:
            problems += error.problems
    if problems:
        raise RowProblems(problems)
    return calls


def _call(call: Any, what: str) -> dict[str, Any]:
    if isinstance(call, dict) and isinstance(call.get("name"), str) and "function" not in call:
        # Hermes, Mistral and ShareGPT write name and arguments at the top.
        inner = {key: call[key] for key in ("name", "arguments", "parameters") if key in call}
        others = {key: value for key, value in call.items() if key not in inner}
        call = {"type": "function", **others, "function": inner}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblems([("tools", f"{what} without the name of a function: {shortened(call)}")])
    name = "arguments" if "arguments" in function else "parameters"
    given = function.get(name)
    arguments = {} if given is None or given == "" else json_value(given)
    if not isinstance(arguments, dict):
        problem = f"{what} whose arguments are not a JSON object: {shortened(given)}"
        raise RowProblems([("tools", problem)])
    rest = {key: value for key, value in function.items() if key != name}
    return {**call, "function": {**rest, "arguments": arguments}}
