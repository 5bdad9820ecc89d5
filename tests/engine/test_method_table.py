"""The page with all methods of PEFT: complete, and as the code decides."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

from lightning_peft.engine.configuration import config_class
from lightning_peft.engine.methods.registry import METHODS, REASONS
from lightning_peft.errors import UnsupportedError

MADE = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "method_table.py"))
KINDS = sorted(kind.value for kind in PeftType)


def test_every_method_of_the_installed_peft_is_served_or_refused_for_a_reason():
    assert sorted([*METHODS, *REASONS]) == KINDS
    assert set(KINDS) == {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def test_the_page_has_one_row_for_each():
    rows = [line for line in MADE["text"]().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == KINDS
    assert MADE["row"]("GLORA")[1:4] == ("PEFT's layers", "on layers that stay dense", "yes")
    assert MADE["row"]("LORA")[1:4] == ("in place", "yes", "yes")
    assert MADE["row"]("OSF")[1:] == ("refused", "", "", REASONS["OSF"])
    assert "Refused: `mica`." in MADE["text"]()
    assert "`layer_replication`" in MADE["text"]()


@pytest.mark.parametrize("kind", REASONS)
def test_a_refused_method_is_refused_with_its_reason(kind):
    with pytest.raises(UnsupportedError, match=REASONS[kind][:30]):
        config_class(kind)


@pytest.mark.parametrize("kind", METHODS)
def test_a_served_method_has_a_config(kind):
    assert config_class(kind) is PEFT_TYPE_TO_CONFIG_MAPPING[kind]
