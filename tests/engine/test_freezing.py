"""Exactly what should train does, and the record knows the rest by every name it has."""

from __future__ import annotations

import pytest
import torch
from models import stack, tiny_llama
from peft import LoraConfig
from torch import nn

import lightning_peft
from lightning_peft import engine

from .reference import injected


def trainable(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


def adapters(*layers: str) -> set[str]:
    return {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}


HEAD = {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("settings", "besides"),
    [
        ({}, HEAD),
        ({"bias": "lora_only"}, HEAD | {"first.bias", "second.bias"}),
        ({"bias": "lora_only", "target_modules": ["first"]}, HEAD | {"first.bias"}),
        ({"bias": "all", "target_modules": ["first"]}, HEAD | {"first.bias", "second.bias"}),
        (
            {"modules_to_save": ["second"], "target_modules": ["first"]},
            HEAD | {"second.weight", "second.bias"},
        ),
        ({"modules_to_save": ["head"]}, HEAD),
        ({"target_modules": ["first", "head"]}, set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_what_trains_in_a_stack(settings: dict, besides: set[str]) -> None:
    model = injected(stack(), r=2, **settings)
    entry = engine.require_record(model).parts[""]
    expected = adapters(*entry.adapters["default"].targets) | besides
    assert trainable(model) == expected
    assert entry.frozen == {name for name, _ in model.named_parameters()} - expected


def test_a_frozen_head_stays_frozen_unless_it_is_saved() -> None:
    for saved in (None, ["head"]):
        model = stack()
        model.head.requires_grad_(False)
        lightning_peft.inject(model, r=2, modules_to_save=saved)
        assert model.head.weight.requires_grad is (saved is not None)
        # In either case it is not part of the frozen base: its values may be random.
        entry = engine.require_record(model).parts[""]
        assert not any(name.startswith("head") for name in entry.base.names)
        assert not any(name.startswith("head") for name in entry.frozen)


def test_biases_of_layers_that_peft_wraps() -> None:
    model = injected(
        stack(), LoraConfig(lora_bias=True, bias="lora_only", target_modules=["first"])
    )
    assert "first.base_layer.bias" in trainable(model)
    assert "second.bias" not in trainable(model)


def test_every_name_of_a_frozen_tensor_is_recorded() -> None:
    model = nn.ModuleDict({"llama": tiny_llama(tied=True)})
    outside = model["llama"].get_input_embeddings()
    model["reader"] = nn.ModuleDict({"embed": outside})
    lightning_peft.inject(model, r=2)
    frozen = engine.require_record(model).frozen
    names = {"llama.model.embed_tokens.weight", "llama.lm_head.weight", "reader.embed.weight"}
    assert names <= frozen
    assert not any(key in engine.trainable_state_dict(model) for key in names)


def test_a_head_that_shares_its_weight_with_the_base_is_frozen() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    model["head"].weight = model["a"].weight
    lightning_peft.inject(model, r=2, target_modules=["b"])
    assert not model["head"].weight.requires_grad
    assert model["head"].bias.requires_grad
    assert "head.weight" in engine.require_record(model).frozen


def test_values_before_training_are_kept_for_what_is_trained_in_full() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Linear(4, 4),
            "saved": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
            "head": nn.Linear(4, 2),
        }
    )
    lightning_peft.inject(
        model, r=2, target_modules=["a"], modules_to_save=["saved"], bias="lora_only"
    )
    initial_values = engine.require_record(model).parts[""].initial_values
    assert initial_values.keys() == {
        "a.bias",
        "saved.0.weight",
        "saved.0.bias",
        "saved.1.weight",
        "saved.1.bias",
        "saved.1.running_mean",
        "saved.1.running_var",
        "saved.1.num_batches_tracked",
    }
    with torch.no_grad():
        model["a"].bias.add_(1)
    assert not torch.equal(initial_values["a.bias"], model["a"].bias)


def test_a_second_adapter_changes_nothing_about_heads() -> None:
    model = injected(stack(), r=2)
    model.head.requires_grad_(False)
    lightning_peft.inject(model, r=2, adapter_name="second")
    assert trainable(model) == adapters("first", "second")


def test_trained_parameters_are_adapters_and_saved_modules() -> None:
    model = injected(stack(), r=2, target_modules=["first"], modules_to_save=["second"])
    entry = engine.require_record(model).parts[""]
    found = engine.trained_parameters(model, entry)
    assert found.keys() == adapters("first") | {"second.weight", "second.bias"}
    assert all(param is model.get_parameter(name) for name, param in found.items())


def test_a_head_under_two_names_is_one_head() -> None:
    model = stack()
    model.forecast = model.head
    lightning_peft.inject(model, r=2)
    entry = engine.require_record(model).parts[""]
    assert trainable(model) == adapters(*entry.adapters["default"].targets) | HEAD
    names = {"head.weight", "head.bias", "forecast.weight", "forecast.bias"}
    assert not names & entry.frozen
    state = engine.trainable_state_dict(model)
    assert names >= {name for name in state if "lora" not in name} >= HEAD
    with torch.no_grad():
        model.head.weight.zero_()
    engine.load_trainable_state_dict(model, {n: torch.ones_like(v) for n, v in state.items()})
    assert bool((model.head.weight == 1).all())
