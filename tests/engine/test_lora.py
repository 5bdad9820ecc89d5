"""Adapters on the layer itself compute what PEFT's wrappers compute."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import Stack, stack, tiny_gpt2, tiny_llama, token_batch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lightning_peft
from lightning_peft.engine.layers.lora import LoraLayer, detach

from .reference import copy_adapter, output_of, peft_model, randomize, relative_error

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


CONFIGS = {
    "lora": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "rank_pattern": {"r": 4, "rank_pattern": {"q_proj": 2, r"1\.mlp\.up_proj": 7}},
    "alpha_pattern": {"r": 4, "alpha_pattern": {"v_proj": 40}},
    "targets": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "regex": {"r": 4, "target_modules": r".*\.0\..*(q|k)_proj"},
    "layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "excluded": {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": [
        "layers.0.self_attn.v_proj"
    ]},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_equals_peft(kind: str) -> None:
    settings = {"target_modules": "all-linear", **CONFIGS[kind]}
    model, config = tiny_llama(), LoraConfig(**settings)
    batch = token_batch()
    reference = peft_model(model, config)
    lightning_peft.inject(model, config)
    randomize(model)
    copied = copy_adapter(model, reference)
    assert copied == sum("lora_" in name for name, _ in reference.named_parameters())
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    mine, theirs = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    out = model(inputs_embeds=mine).logits
    expected = reference(inputs_embeds=theirs).logits
    assert relative_error(out, expected) < 1e-6
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert relative_error(mine.grad, theirs.grad) < 1e-5
    peft_grads = {
        name.removeprefix("base_model.model."): param.grad
        for name, param in reference.named_parameters()
    }
    compared = 0
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert relative_error(param.grad, peft_grads[name]) < 1e-5, name
            compared += 1
    assert compared == copied


def test_conv1d_equals_peft() -> None:
    model, config = tiny_gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    batch = token_batch()
    reference = peft_model(model, config)
    lightning_peft.inject(model, config)
    randomize(model)
    assert copy_adapter(model, reference) == 4
    torch.testing.assert_close(output_of(model, batch), output_of(reference, batch))


def test_the_same_seed_initialises_and_drops_as_peft_does() -> None:
    model = tiny_llama()
    config = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "up_proj"])
    torch.manual_seed(5)
    reference = peft_model(model, config).train()
    torch.manual_seed(5)
    lightning_peft.inject(model, config)
    theirs = dict(reference.named_parameters())
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert torch.equal(param, theirs[f"base_model.model.{name}"]), name
    randomize(model)
    copy_adapter(model, reference)
    model.train()
    batch = token_batch()
    torch.manual_seed(7)
    out = output_of(model, batch)
    torch.manual_seed(7)
    torch.testing.assert_close(out, output_of(reference, batch))
    torch.manual_seed(8)
    assert not torch.allclose(out, output_of(model, batch))


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 12 / 3), (True, 12 / math.sqrt(3))])
def test_one_layer_is_w_plus_scaled_b_a(use_rslora: bool, scaling: float) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(5, 4)})
    lightning_peft.inject(
        model, r=3, lora_alpha=12, target_modules=["layer"], use_rslora=use_rslora
    )
    values = randomize(model)
    a, b = values["layer.lora_A.default.weight"], values["layer.lora_B.default.weight"]
    layer = model["layer"]
    weight, bias = layer._parameters["weight"], layer.bias
    x = torch.randn(2, 6, 5)
    expected = F.linear(x, weight + scaling * (b @ a), bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.get_delta_weight("default"), scaling * (b @ a))


def test_delta_of_a_conv1d_has_the_layout_of_its_weight() -> None:
    model = nn.ModuleDict({"layer": Conv1D(6, 4)})
    lightning_peft.inject(model, r=2, target_modules=["layer"])
    randomize(model)
    layer = model["layer"]
    assert layer.get_delta_weight("default").shape == (4, 6)
    x = torch.randn(3, 4)
    torch.testing.assert_close(
        layer(x), x @ (layer._parameters["weight"] + layer.get_delta_weight("default")) + layer.bias
    )


def test_half_precision_base_gets_float32_adapters_and_answers_in_half_precision() -> None:
    model = stack().to(torch.bfloat16)
    lightning_peft.inject(model, r=4)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    values = randomize(model)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    out = model.first(x)
    assert out.dtype == torch.bfloat16
    delta = values["first.lora_B.default.weight"] @ values["first.lora_A.default.weight"] * 2
    weight = model.first._parameters["weight"].float() + delta
    exact = F.linear(x.float(), weight, model.first.bias.float())
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.05)
    out.sum().backward()
    assert model.first.lora_A["default"].weight.grad.dtype == torch.float32


def test_float64_base_stays_in_float64() -> None:
    model = stack().double()
    lightning_peft.inject(model, r=4)
    randomize(model)
    x = torch.randn(3, 96, dtype=torch.float64)
    layer = model.first
    expected = F.linear(
        x, layer._parameters["weight"] + layer.get_delta_weight("default"), layer.bias
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), expected, rtol=1e-12, atol=0)


def test_autocast_computes_in_its_dtype() -> None:
    model = stack()
    lightning_peft.inject(model, r=4)
    randomize(model)
    x = torch.randn(3, 96)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert model.first.lora_A["default"].weight.grad.any()


def test_layer_may_be_called_with_names() -> None:
    model = stack()
    lightning_peft.inject(model, r=4)
    randomize(model)
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


def test_attach_follows_the_mode_of_the_layer() -> None:
    model = stack()
    model.first.eval()
    lightning_peft.inject(model, r=4, lora_dropout=0.5)
    assert not any(child.training for child in model.first.modules())
    assert all(child.training for child in model.second.modules())


def test_detach_restores_the_layer() -> None:
    model = stack()
    before = set(model.first.__dict__), set(model.first._modules)
    lightning_peft.inject(model, r=4)
    assert isinstance(model.first, LoraLayer)
    detach(model.first)
    assert type(model.first) is nn.Linear
    assert (set(model.first.__dict__), set(model.first._modules)) == before


def test_a_copy_of_the_layer_computes_the_same_and_trains_apart() -> None:
    model = stack()
    lightning_peft.inject(model, r=4)
    randomize(model)
    other = copy.deepcopy(model)
    x = torch.randn(3, 96)
    assert torch.equal(model(x), other(x))
    randomize(other)
    assert not torch.equal(model(x), other(x))
