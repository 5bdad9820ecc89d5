"""Nothing that refers to an adapted layer notices that its class was extended."""

from __future__ import annotations

import copy
import io
import pickle

import bitsandbytes as bnb
import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.layers.mixin import (
    LayerMixin,
    add_mixin,
    class_key,
    remove_mixin,
)

from .reference import adapted, injected, output_of, randomize

NF4 = {"quantization_config": engine.quantization_config()}


class Scaled(nn.Linear):
    """A user's subclass with attributes, an own constructor and an own forward."""

    def __init__(self, features: int, scale: float) -> None:
        super().__init__(features, features)
        self.scale = scale
        self.calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(input, self.weight, self.bias) * self.scale


class Aliased(nn.Module):
    """One layer under two names, one of which is called, and a branch on the kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(96, 96)
        self.alias = self.shared
        self.scaled = Scaled(96, 3.0)
        self.head = nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.alias, nn.Linear)
        return self.head(self.scaled(self.alias(x)))


@pytest.mark.parametrize("quantized", [{}, NF4], ids=["dense", "nf4"])
def test_both_names_of_one_layer_carry_the_adapter(quantized: dict) -> None:
    model = injected(Aliased(), r=4, **quantized)
    assert model.shared is model.alias
    x = torch.randn(2, 96)
    before = model(x)
    randomize(model)
    assert not torch.allclose(model(x), before)
    assert torch.equal(model.shared(x), model.alias(x))
    assert engine.adapted_layers(model).keys() == {"shared", "scaled"}


def test_a_layer_may_be_meant_by_its_second_name() -> None:
    model = injected(Aliased(), r=4, target_modules=["alias"])
    assert "lora_A" in model.shared._modules
    report = lightning_peft.report(model)
    assert report.parts[0].adapted == {"shared": 1}


@pytest.mark.parametrize("quantized", [{}, NF4], ids=["dense", "nf4"])
def test_kind_attributes_and_subclass_behaviour_survive(quantized: dict) -> None:
    model = Aliased()
    x = torch.randn(2, 96)
    plain = model.scaled(x)
    lightning_peft.inject(model, r=4, **quantized)
    layer = model.scaled
    assert isinstance(layer, Scaled)
    assert (layer.scale, layer.in_features, layer.out_features) == (3.0, 96, 96)
    assert layer.bias.shape == (96,)
    assert torch.equal(layer(x), plain)
    assert layer.calls == 2
    # A subclass may compute in its own way, so its weight is never quantized.
    assert not isinstance(layer, bnb.nn.Linear4bit)


def test_names_and_order_of_base_parameters_stay() -> None:
    for model, quantized in ((tiny_llama(), {}), (tiny_gpt2(), {}), (stack(), {}), (stack(), NF4)):
        names = [name for name, _ in model.named_parameters()]
        keys = list(model.state_dict())
        lightning_peft.inject(model, r=4, **quantized)
        assert [n for n, _ in model.named_parameters() if "lora_" not in n] == names
        if not quantized:
            assert [key for key in model.state_dict() if "lora_" not in key] == keys


def test_full_precision_checkpoint_still_loads_by_its_own_names() -> None:
    source, model = tiny_llama(), tiny_llama()
    batch = token_batch()
    expected = output_of(source, batch)
    lightning_peft.inject(model, r=4)
    result = model.load_state_dict(source.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys
    assert all("lora_" in key for key in result.missing_keys)
    assert torch.equal(output_of(model, batch), expected)


@pytest.mark.parametrize("build", [lambda: tiny_llama(tied=True), tiny_gpt2])
@pytest.mark.parametrize("quantized", [{}, NF4], ids=["dense", "nf4"])
def test_tied_weights_stay_one_tensor(build, quantized: dict) -> None:
    model = injected(build(), r=4, **quantized)
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    assert not embedding.requires_grad


@pytest.mark.parametrize("quantized", [{}, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(way: str, quantized: dict) -> None:
    model = adapted(lora_dropout=0.1, **quantized)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    model.eval(), other.eval()
    x = torch.randn(3, 96)
    expected = model(x)
    assert torch.equal(other(x), expected)
    assert type(other.first) is type(model.first)
    assert type(other.first._parameters["weight"]) is type(model.first._parameters["weight"])
    assert lightning_peft.report(other) == lightning_peft.report(model)
    # Everything still works on the copy, and nothing of it reaches the original.
    randomize(other)
    with lightning_peft.disable_adapters(other):
        other(x)
    other.train()(x).sum().backward()
    lightning_peft.merge(other)
    lightning_peft.unload(other)
    assert type(other.first) is nn.Linear
    assert torch.equal(model(x), expected)


def test_a_custom_getstate_is_used() -> None:
    class Forgetful(nn.Linear):
        def __getstate__(self) -> dict:
            return {k: v for k, v in self.__dict__.items() if k != "cache"}

    model = injected(nn.ModuleDict({"layer": Forgetful(4, 4)}), r=2, target_modules=["layer"])
    model["layer"].cache = "large"
    assert not hasattr(copy.deepcopy(model)["layer"], "cache")


def test_unload_gives_the_classes_back() -> None:
    model = Aliased()

    def seen() -> list[tuple[str, type, set[str], list[str]]]:
        named = model.named_modules()
        return [(name, type(x), set(vars(x)), list(x._modules)) for name, x in named]

    before, keys = seen(), list(model.state_dict())
    lightning_peft.inject(model, r=4)
    assert lightning_peft.unload(model) is model
    assert seen() == before
    assert list(model.state_dict()) == keys


def test_extend_and_retract_are_inverse_in_any_order() -> None:
    class First(LayerMixin):
        label = "First"

    class Second(LayerMixin):
        label = "Second"

    layer = nn.Linear(2, 2)
    add_mixin(layer, First)
    only_first = type(layer)
    add_mixin(layer, Second)
    assert type(layer).__name__ == "SecondFirstLinear"
    assert type(layer).__mro__[1:3] == (Second, First)
    remove_mixin(layer, Second)
    assert type(layer) is only_first
    add_mixin(layer, Second)
    remove_mixin(layer, First)
    assert class_key(layer) == ((Second,), nn.Linear, nn.Linear)
    remove_mixin(layer, Second)
    assert type(layer) is nn.Linear
