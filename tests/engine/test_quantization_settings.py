"""Quantization settings: checked together, YAML-able, and the same after a round trip."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BitsAndBytesConfig

from lightning_peft.engine.backends.registry import (
    quantization_config,
    quantization_from_dict,
    quantization_to_dict,
)
from lightning_peft.errors import ConfigError, UnsupportedError


def test_defaults_are_those_of_qlora() -> None:
    config = quantization_config()
    assert config.load_in_4bit
    assert not config.load_in_8bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is None


def test_a_ready_config_is_taken_as_it_is() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert quantization_config(config) is config
    assert config.bnb_4bit_compute_dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [
        quantization_config(),
        quantization_config(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
        quantization_config(bnb_4bit_compute_dtype="bfloat16"),
        quantization_config(load_in_8bit=True),
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0),
        BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["proj"]),
    ],
)
def test_settings_survive_as_json(config: BitsAndBytesConfig) -> None:
    fields = quantization_to_dict(config)
    again = quantization_from_dict(json.loads(json.dumps(fields)))
    assert quantization_to_dict(again) == fields
    for name in ("llm_int8_skip_modules", "bnb_4bit_compute_dtype", "llm_int8_threshold"):
        if name in fields:
            assert getattr(again, name) == getattr(config, name)


def test_none_stays_none() -> None:
    assert quantization_to_dict(None) is None
    assert quantization_from_dict(None) is None


def test_a_mapping_may_be_what_transformers_writes() -> None:
    written = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    assert quantization_config(written).bnb_4bit_quant_type == "nf4"


def test_all_problems_are_reported_at_once() -> None:
    fields = {
        "load_in_4bit": True,
        "bnb_4bit_quant_typ": "nf4",
        "bnb_4bit_quant_type": "nf3",
        "bnb_4bit_compute_dtype": "int8",
        "llm_int8_has_fp16_weight": True,
    }
    with pytest.raises(ConfigError) as caught:
        quantization_config(fields)
    for part in ("'bnb_4bit_quant_typ'", "'nf3'", "'int8'", "llm_int8_has_fp16_weight"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bnb_4bit_quant_type": "int4"}, "'nf4' or 'fp4'"),
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}, "drop one of the two"),
        ({"bnb_4bit_compute_dtype": "float64"}, "'float32', 'bfloat16' or 'float16'"),
        ({"load_in_4bit": False}, "quantizes nothing"),
        ({"config": {"load_in_4bit": True, "load_in_8bit": True}}, "only one can be used"),
        ({"config": {"load_in_4bit": "yes"}}, "must be a boolean"),
        ({"config": BitsAndBytesConfig()}, "quantizes nothing"),
    ],
)
def test_contradictions_are_config_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantization_config(**arguments)


def test_codes_stored_as_floats_are_refused() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16")
    with pytest.raises(UnsupportedError, match="random weights"):
        quantization_config(config)
