"""The LoRA arguments: one definition that constructors, the command line and layers follow."""

from __future__ import annotations

import inspect

import jsonargparse
import pytest
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.arguments import LoRAArguments, LoRAFields, QLoRAArguments
from lightning_peft.errors import ConfigError

CLASSES = {
    "LoRAStrategy": LoRAArguments,
    "LoRACallback": LoRAArguments,
    "QLoRAStrategy": QLoRAArguments,
    "QLoRACallback": QLoRAArguments,
}


@pytest.mark.parametrize("name", CLASSES)
def test_constructors_have_the_signature_of_the_dataclass(name):
    signature = inspect.signature(getattr(lightning_peft, name))
    expected = inspect.signature(CLASSES[name])
    assert dict(signature.parameters) == dict(expected.parameters)
    assert signature.parameters["peft_config"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert signature.parameters["r"].kind is inspect.Parameter.KEYWORD_ONLY


def test_qlora_adds_its_own_defaults():
    ours, lora = (inspect.signature(cls).parameters for cls in (QLoRAArguments, LoRAArguments))
    assert (lora["optimizer"].default, ours["optimizer"].default) == (None, "auto")
    assert lora["gradient_checkpointing"].default == "auto"
    assert ours["gradient_checkpointing"].default == "auto"
    assert set(lora) < set(ours)


@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_has_help_and_default_on_the_command_line(name):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(lightning_peft, name), "strategy")
    actions = {action.dest: action for action in parser._actions}
    for parameter in inspect.signature(CLASSES[name]).parameters.values():
        action = actions[f"strategy.{parameter.name}"]
        assert action.default == parameter.default
        assert len(str(action.help)) > 20, parameter.name
    assert actions["strategy.r"].help == "Rank of the adapters."
    for wrong in ("r=many", "verify=chep", "bias=lora_onyl"):
        with pytest.raises(jsonargparse.ArgumentError):
            parser.parse_args([f"--strategy.{wrong}"])


@pytest.mark.parametrize("name", CLASSES)
def test_attributes_are_the_arguments(name):
    made = getattr(lightning_peft, name)(r=8, target_modules=["0"], verify="off")
    assert isinstance(made, CLASSES[name])
    assert (made.r, made.lifecycle.injection.peft_config.r) == (8, 8)
    assert made.explicitly_set() == {"r", "target_modules", "verify"}


def test_the_rank_reaches_the_layer():
    module = nn.Sequential(nn.Linear(6, 4))
    engine.inject(module, engine.lora_config(LoRAFields(r=3, target_modules=["0"])), adapt="")
    (layer,) = engine.adapted_layers(module).values()
    (adapter,) = layer.adapter_settings.values()
    assert adapter.r == 3
    with pytest.raises(ConfigError, match="r=0: the rank is a positive integer"):
        lightning_peft.LoRAStrategy(r=0)
