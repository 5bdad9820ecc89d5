"""Settings that cannot work are refused together, with the value and the fix."""

from __future__ import annotations

import json

import peft
import pytest
from peft import LoraConfig

from lightning_peft.arguments import LoRAFields
from lightning_peft.engine.configuration import (
    as_peft_config,
    config_differences,
    config_from_dict,
    config_to_dict,
    lora_config,
)
from lightning_peft.engine.methods.lora_config import changes_base
from lightning_peft.errors import ConfigError, UnsupportedError


def test_defaults_are_the_common_heuristics() -> None:
    config = lora_config(LoRAFields(r=8))
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 16, "all-linear")
    assert lora_config(LoRAFields(lora_alpha=3)).lora_alpha == 3


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        lora_config(
            LoRAFields(
                r=0,
                lora_alpha=-1,
                lora_dropout=1.5,
                bias="some",
                rank_pattern={"q": 0},
                alpha_pattern={"v": "a"},
                target_modules=[],
                init_lora_weights="magic",
                exclude_modules="(",
            )
        )
    message = str(caught.value)
    for part in (
        "r=0",
        "lora_alpha=-1",
        "lora_dropout=1.5",
        "bias='some'",
        "rank_pattern['q']=0",
        "alpha_pattern['v']='a'",
        "target_modules is empty",
        "init_lora_weights='magic'",
        "exclude_modules: '(' is not a regular expression",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4.0}, "r=4.0: the rank is a positive integer"),
        ({"r": True}, "r=True"),
        ({"r": "16"}, "r='16'"),
        ({"lora_dropout": "0.1"}, "lora_dropout='0.1'"),
        ({"lora_alpha": 0}, "trains nothing"),
        ({"init_lora_weights": "mica"}, "freezes B"),
        ({"init_lora_weights": "pissa_niter_x"}, "one of gaussian, orthogonal, pissa"),
        ({"target_modules": ".*_proj", "layers_to_transform": [0]}, "put the indices into"),
        ({"target_modules": "*_proj"}, "not a regular expression"),
        ({"rank_pattern": {"[": 4}}, "rank_pattern: '\\['"),
    ],
)
def test_each_problem_names_value_and_reason(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        lora_config(LoRAFields(**settings))


def test_good_values_are_accepted() -> None:
    for init in (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"):
        assert lora_config(LoRAFields(init_lora_weights=init)).init_lora_weights == init
    assert lora_config(LoRAFields(layers_to_transform=[0, 2])).layers_to_transform == [0, 2]
    assert (
        lora_config(
            LoRAFields(target_modules="all-linear", layers_to_transform=1)
        ).layers_to_transform
        == 1
    )


def test_a_ready_config_is_taken_as_it_is_and_checked() -> None:
    config = LoraConfig(r=3, target_modules=["q_proj"])
    assert as_peft_config(config) is config
    with pytest.raises(ConfigError, match="r=0"):
        as_peft_config(LoraConfig(r=0, target_modules=["q_proj"]))


def test_a_mapping_as_yaml_gives_it() -> None:
    config = as_peft_config({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]})
    assert isinstance(config, LoraConfig)
    assert config.target_modules == {"q_proj"}
    assert isinstance(as_peft_config({"peft_type": "IA3"}), peft.IA3Config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4}, "does not say which method"),
        ({"peft_type": "LORRA"}, "is not a method of PEFT"),
        ({"peft_type": "LORA", "rank": 4, "alpha": 2}, "'alpha', 'rank' in peft_config"),
        ({"peft_type": "LORA", "r": -2}, "r=-2"),
    ],
)
def test_a_wrong_mapping_is_a_config_error(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_peft_config(fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "virtual tokens"),
        (peft.OSFConfig(), "it rewrites the base weights"),
        (LoraConfig(target_modules=["q"], layer_replication=[(0, 1)]), "layer_replication"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_methods_that_would_be_silently_wrong_are_refused(config, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        as_peft_config(config)


@pytest.mark.parametrize(
    "config",
    [
        lora_config(
            LoRAFields(r=4, rank_pattern={"q_proj": 2}, modules_to_save=["head"], bias="all")
        ),
        lora_config(LoRAFields(layers_to_transform=[0, 1])),
        lora_config(
            LoRAFields(
                target_modules=["b", "a"], use_rslora=True, init_lora_weights="pissa_niter_4"
            )
        ),
        peft.IA3Config(target_modules=["k", "v"], feedforward_modules=["v"]),
        peft.LoHaConfig(r=4, target_modules=["q"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_configs_survive_as_json(config) -> None:
    fields = config_to_dict(config)
    again = config_from_dict(json.loads(json.dumps(fields)))
    assert type(again) is type(config)
    assert config_to_dict(again) == fields
    assert not config_differences(fields, config_to_dict(again))


def test_fields_of_another_version_are_left_out() -> None:
    fields = config_to_dict(lora_config(LoRAFields(r=4)))
    again = config_from_dict({**fields, "field_of_the_future": 1})
    assert config_to_dict(again) == fields


def test_only_decisive_fields_make_a_difference() -> None:
    mine = config_to_dict(lora_config(LoRAFields(r=4, target_modules=["a", "b"], lora_dropout=0.1)))
    same = config_to_dict(lora_config(LoRAFields(r=4, target_modules=["b", "a"], lora_dropout=0.2)))
    assert config_differences(mine, same) == []
    other = config_to_dict(lora_config(LoRAFields(r=8, target_modules=["a", "b"], use_rslora=True)))
    assert config_differences(mine, other) == ["r", "lora_alpha", "use_rslora"]


def test_which_initialisations_rewrite_the_base() -> None:
    rewriting = ("pissa", "pissa_niter_4", "olora", "PiSSA")
    assert all(changes_base(LoraConfig(init_lora_weights=init)) for init in rewriting)
    for init in (True, False, "gaussian", "orthogonal"):
        assert not changes_base(LoraConfig(init_lora_weights=init))
    assert not changes_base(peft.IA3Config())
