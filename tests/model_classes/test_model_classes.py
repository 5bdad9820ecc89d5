"""Default adapters on transformers' model classes: LoRA, QLoRA, steps, files, equal logits."""

from __future__ import annotations

import re

import pytest
import transformers

from model_classes.reasons import NOT_TRIED
from model_classes.rows import rows, run, tried
from model_classes.table import PAGE

# One of each family whose code treats weights, experts or layers in its own way.
FEW = (
    "FalconForCausalLM",
    "Gemma3nForCausalLM",
    "MambaForCausalLM",
    "ResNetForImageClassification",
)


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """Saving says where PEFT reads a folder otherwise; other tests are about that."""


def outcome(row, method):
    found = run(row, method)
    assert found == "yes" or found.startswith("refused: "), found
    return found


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=() if row.name in FEW else pytest.mark.long)
        for row in tried()
    ],
)
def test_every_class_is_as_the_page_states(row):
    stated = re.search(rf"^\| {row.name} \| (\d+) \| (.*) \| (.*) \|$", PAGE.read_text(), re.M)
    assert stated is not None
    lora, qlora = (outcome(row, method) for method in ("lora", "qlora"))
    assert (lora.partition(". ")[0], qlora.partition(". ")[0]) == stated.groups()[1:]
    assert row.layers == int(stated[1])


def test_the_page_names_every_class():
    page = PAGE.read_text()
    assert [row.name for row in rows() if f"| {row.name} |" not in page] == []
    # Older versions of transformers lack some of them.
    here = {name for name in NOT_TRIED if hasattr(transformers, name)}
    assert here <= {row.name for row in rows()}
    assert [name for name in NOT_TRIED if f"| {name} |" not in page] == []
