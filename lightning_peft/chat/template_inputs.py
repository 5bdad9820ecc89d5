"""Command-line inputs of chat templates: tools and variables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_peft.data.samples import Message, RowProblems
from lightning_peft.data.template_context import read_calls, read_context
from lightning_peft.errors import ConfigError


def read_tools_file(file: str | None) -> list[dict[str, Any]]:
    """Returns the tools in a JSON file, as chat templates read them."""
    if file is None:
        return []
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tools {file!r} cannot be read as text: {error}") from error
    tools: list[dict[str, Any]] = context_of("tools", text, f"--tools {file!r}").get("tools", [])
    if not tools:
        raise ConfigError(f"--tools {file!r} holds no tools. Leave the option out for none.")
    return tools


def read_variables(text: str | None) -> dict[str, Any] | None:
    """Returns the values in a JSON object, ``None`` where there is none."""
    if text is None:
        return None
    try:
        variables = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--chat-template-kwargs {text!r} is not JSON: {error}") from error
    return context_of("chat_template_kwargs", variables, "--chat-template-kwargs")


def context_of(name: str, value: Any, what: str) -> dict[str, Any]:
    """Returns ``"tools"`` or ``"chat_template_kwargs"`` of a row as a chat template gets it.

    ``what`` says where it is from, for messages.
    """
    with _as_config_error(what):
        return read_context({name: value})


def turn_of(message: dict[str, Any]) -> Message:
    """Returns a turn of a request, its tool calls as chat templates read them."""
    if not message.get("tool_calls"):
        return message
    with _as_config_error("messages:"):
        return {**message, "tool_calls": read_calls(message["tool_calls"], "the turn")}


@contextmanager
def _as_config_error(what: str) -> Iterator[None]:
    try:
        yield
    except RowProblems as error:
        problems = "; ".join(problem for _, problem in error.problems)
        raise ConfigError(f"{what} {problems}.") from error
