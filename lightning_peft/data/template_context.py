"""What a chat template gets with the turns: tools, documents, and variables of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.data.samples import collect, row_problem, shortened
from lightning_peft.data.tool_calls import is_empty, json_value, read_tools

# Arguments of `apply_chat_template` that are not variables of a template, or set for each row.
RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "padding"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "truncation"),
        *("sanitize_control_tokens", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)


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
