"""Safe YAML of visitors: plain values, no aliases, no duplicate keys, limited size."""

from __future__ import annotations

import datetime
import re
from typing import Any

import yaml

from gradio_app.errors import UserError
from gradio_app.guards import shortened

MAX_CHARACTERS = 100_000
MAX_VALUES = 5_000
MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """YAML as JSON has it, and numbers such as ``2e-4``, which YAML 1.1 takes for text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise UserError("checks.alias", line=self.peek_event().start_mark.line + 1)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise UserError("checks.twice", name=shortened(key.value), line=line)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: object) -> dict[str, Any]:
    """Returns the mapping that YAML of a visitor holds; tags and aliases are refused."""
    if not isinstance(text, str) or not text.strip():
        raise UserError("checks.empty")
    if len(text) > MAX_CHARACTERS:
        raise UserError("checks.large", most=f"{MAX_CHARACTERS:,}", has=f"{len(text):,}")
    loader = None
    try:
        loader = _Loader(text)
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError("checks.yaml", **_error_values(error)) from error
    except (RecursionError, ValueError) as error:
        raise UserError("checks.yaml", line="?", reason=shortened(error, 120)) from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise UserError("checks.no_keys", content=shortened(content))
    _check_values(content)
    return content


def _error_values(error: yaml.YAMLError) -> dict[str, object]:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or error
    return {"line": mark.line + 1 if mark else "?", "reason": shortened(reason, 160)}


def _check_values(content: dict[str, Any]) -> None:
    count = 0
    waiting: list[tuple[int, Any]] = [(0, content)]
    while waiting:
        depth, value = waiting.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise UserError("checks.many", most=f"{MAX_VALUES:,}", deepest=MAX_DEPTH)
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise UserError("checks.key", name=shortened(key))
                waiting.append((depth + 1, inner))
        elif isinstance(value, list):
            waiting.extend((depth + 1, inner) for inner in value)
        elif isinstance(value, (datetime.date, bytes, set, tuple)) or "\0" in str(value):
            raise UserError("checks.value", value=shortened(value))


def dump_yaml(content: dict[str, Any]) -> str:
    """Returns a recipe as YAML, in its own order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
