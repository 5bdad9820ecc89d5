"""Conversion of values to primitives for JSON and ``weights_only=True``."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import torch


def to_primitives(value: Any) -> Any:
    """Returns ``value`` as JSON-able primitives: enums by value, sets sorted, dtypes by name."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(to_primitives(key)): to_primitives(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(to_primitives(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [to_primitives(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_primitives(dataclasses.asdict(value))
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
