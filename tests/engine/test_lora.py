"""Adapters on the layer itself compute what PEFT's wrappers compute."""

from __future__ import annotations

import pytest
import torch
from models import Stack, stack, tiny_gpt2, tiny_llama, token_batch
from torch import nn
from torch.nn import functional as F

import lightning_peft

from .reference import adapted, injected, output_of, randomize

MODELS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,
    "stack": stack,
}


def batch_for(model: nn.Module) -> object:
    return torch.randn(3, 96) if isinstance(model, Stack) else token_batch()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_fresh_adapters_change_nothing_bit_for_bit(kind: str, use_rslora: bool) -> None:
    model = MODELS[kind]()
    batch = batch_for(model)
    before = output_of(model, batch)
    lightning_peft.inject(model, r=4, use_rslora=use_rslora)
    assert torch.equal(output_of(model, batch), before)
    randomize(model)
    assert not torch.allclose(output_of(model, batch), before, atol=1e-3)


def test_float64_base_stays_in_float64() -> None:
    model = injected(stack().double(), r=4)
    randomize(model)
    x = torch.randn(3, 96, dtype=torch.float64)
    layer = model.first
    expected = F.linear(x, layer._parameters["weight"] + layer.delta_weight("default"), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), expected, rtol=1e-12, atol=0)


def test_layer_may_be_called_with_names() -> None:
    model = adapted()
    x = torch.randn(3, 96)
    assert torch.equal(model.first(input=x), model.first(x))


def test_several_active_adapters_add_up() -> None:
    model = stack()
    x = torch.randn(3, 96)
    base = model.first(x)
    lightning_peft.inject(model, r=4, adapter_name="a")
    lightning_peft.inject(model, r=2, adapter_name="b")
    randomize(model)
    alone = {}
    for name in ("a", "b"):
        lightning_peft.set_adapter(model, name)
        alone[name] = model.first(x) - base
    lightning_peft.set_adapter(model, ["a", "b"])
    torch.testing.assert_close(model.first(x) - base, alone["a"] + alone["b"])
