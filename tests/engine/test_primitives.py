"""Everything that goes into a checkpoint or a file is plain."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftType

from lightning_peft.engine.primitives import to_primitives


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Inner:
    sizes: tuple[int, ...]


def test_values_become_what_json_knows() -> None:
    value = {
        "enum": Colour.RED,
        PeftType.LORA: {"b", "a"},
        "dtype": torch.bfloat16,
        "nested": [Inner((1, 2)), None, True, 1.5],
        3: Path("x"),
    }
    assert to_primitives(value) == {
        "enum": "red",
        "LORA": ["a", "b"],
        "dtype": "bfloat16",
        "nested": [{"sizes": [1, 2]}, None, True, 1.5],
        "3": "x",
    }
    json.dumps(to_primitives(value))


def test_string_enums_lose_their_class() -> None:
    assert type(to_primitives(PeftType.LORA)) is str
