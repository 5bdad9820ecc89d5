"""YAML of visitors: plain values only, no aliases, no key twice, not large."""

from __future__ import annotations

import datetime
import re
from typing import Any

import yaml

from gradio_app.errors import Refused
from gradio_app.guards import shortened

MOST_CHARACTERS = 100_000
MOST_VALUES = 5_000
DEEPEST = 20


class _Loader(yaml.SafeLoader):
    """YAML as JSON has it, and numbers such as ``2e-4``, which YAML 1.1 takes for text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise Refused("checks.alias", line=self.peek_event().start_mark.line + 1)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise Refused("checks.twice", name=shortened(key.value), line=line)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parsed(text: object) -> dict[str, Any]:
    """Returns the mapping that YAML holds.

    Raises:
        Refused: If it is not YAML, has tags or aliases, or is too large.
    """
    if not isinstance(text, str) or not text.strip():
        raise Refused("checks.empty")
    if len(text) > MOST_CHARACTERS:
        raise Refused("checks.large", most=f"{MOST_CHARACTERS:,}", has=f"{len(text):,}")
    loader = None
    try:
        loader = _Loader(text)
        content = loader.get_single_data()
    except yaml.YAMLError as error:
        raise Refused("checks.yaml", **_told(error)) from error
    except (RecursionError, ValueError) as error:
        raise Refused("checks.yaml", line="?", reason=shortened(error, 120)) from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict):
        raise Refused("checks.no_keys", has=shortened(content))
    _check_values(content)
    return content


def _told(error: yaml.YAMLError) -> dict[str, object]:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or error
    return {"line": mark.line + 1 if mark else "?", "reason": shortened(reason, 160)}


def _check_values(content: dict[str, Any]) -> None:
    count = 0
    waiting: list[tuple[int, Any]] = [(0, content)]
    while waiting:
        depth, value = waiting.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise Refused("checks.many", most=f"{MOST_VALUES:,}", deepest=DEEPEST)
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise Refused("checks.key", name=shortened(key))
                waiting.append((depth + 1, inner))
        elif isinstance(value, list):
            waiting.extend((depth + 1, inner) for inner in value)
        elif isinstance(value, (datetime.date, bytes, set, tuple)) or "\0" in str(value):
            raise Refused("checks.value", value=shortened(value))


def dumped(content: dict[str, Any]) -> str:
    """Returns a recipe as YAML, in its own order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
