"""Counts by hand, on any module and on the meta device; PEFT's other methods through wrappers."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import Stack, stack, tiny_gpt2, tiny_llama
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.fingerprint import NO_VALUES

from .reference import injected

NF4 = engine.quantization_config()


# --- counts ------------------------------------------------------------------------------------


def test_counts_of_a_stack_by_hand() -> None:
    report = lightning_peft.inject(stack(), r=4)
    adapters = 4 * (96 + 64) + 4 * (64 + 96)
    base = (96 * 64 + 64) + (64 * 96 + 96)
    head = 96 * 10 + 10
    assert report.adapter_parameters == adapters == 1280
    assert report.trainable_parameters == adapters + head
    assert report.total_parameters == adapters + base + head


def test_counts_of_a_gpt2_by_hand() -> None:
    report = lightning_peft.inject(tiny_gpt2(), r=4)
    block = 4 * (64 + 192) + 4 * (64 + 64) + 4 * (64 + 256) + 4 * (256 + 64)
    assert report.trainable_parameters == 2 * block


@pytest.mark.parametrize("tied", [False, True])
def test_counts_of_a_llama_by_hand(tied: bool) -> None:
    model = tiny_llama(tied)
    base = sum(param.numel() for param in model.parameters())
    report = lightning_peft.inject(model, r=4, rank_pattern={"q_proj": 8})
    attention = 8 * (64 + 64) + 2 * 4 * (64 + 32) + 4 * (64 + 64)
    mlp = 2 * 4 * (64 + 96) + 4 * (96 + 64)
    assert report.trainable_parameters == 2 * (attention + mlp)
    assert report.total_parameters == base + report.trainable_parameters


@pytest.fixture(scope="module")
def llama_3_8b() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(("r", "trainable"), [(16, 41_943_040), (64, 167_772_160)])
def test_llama_3_8b_on_the_meta_device(llama_3_8b, r: int, trainable: int) -> None:
    """The counts that are published for this model, without a single value in memory."""
    report = lightning_peft.inject(llama_3_8b, r=r)
    assert report.trainable_parameters == report.adapter_parameters == trainable
    assert report.total_parameters == 8_030_261_248 + trainable
    if r == 16:
        assert report.total_parameters == 8_072_204_288
    assert report.dense_base_bytes == report.base_bytes == 4 * 8_030_261_248
    assert {param.device.type for param in llama_3_8b.parameters()} == {"meta"}
    entry = engine.require_record(llama_3_8b).parts[""]
    assert set(entry.base.sums) == {NO_VALUES}
    lightning_peft.unload(llama_3_8b)


def test_one_large_linear_layer() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4096, 11008, bias=False, device="meta")})
    report = lightning_peft.inject(model, r=16, target_modules=["layer"])
    assert report.trainable_parameters == 241_664
    assert report.total_parameters - report.trainable_parameters == 45_088_768
    assert round(100 * (1 - 241_664 / 45_088_768), 2) == 99.46


# --- biases and saved modules, as in PEFT -------------------------------------------------------


# --- what a user's module sees ------------------------------------------------------------------


def test_nothing_warns_and_arguments_stay_as_they_are() -> None:
    model = tiny_gpt2()
    config = LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["lm_head", "wte"])
    before = config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lightning_peft.inject(model, config, quantization_config=NF4)
    assert config.to_dict() == before
    assert not hasattr(model, "peft_config")


def test_train_and_eval_modes_stay_as_they_are() -> None:
    model = stack().train()
    model.second.eval()
    lightning_peft.inject(model, r=4, lora_dropout=0.1)
    assert model.first.training
    assert model.first.lora_dropout["default"].training
    assert not model.second.lora_dropout["default"].training


def test_random_stream_of_the_user_moves_the_same_with_and_without_quantization() -> None:
    after = []
    for quantization in (None, NF4):
        torch.manual_seed(0)
        model = injected(stack(), r=4, quantization_config=quantization)
        after.append((torch.rand(1), model.first.lora_A["default"].weight.detach().clone()))
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_layers_that_were_quantized_before_are_adopted() -> None:
    import bitsandbytes as bnb

    model = stack()
    model.second = bnb.nn.LinearNF4(64, 96).to("cpu")
    x = torch.randn(3, 96)
    before = model(x)
    report = lightning_peft.inject(model, r=4)
    assert report.parts[0].quantization == "as loaded"
    assert report.parts[0].quantized == 1
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert model.second.lora_B["default"].weight.grad.any()


# --- other methods, in PEFT's wrappers ----------------------------------------------------------


def test_the_module_itself_is_not_replaced() -> None:
    model = Stack()
    first = model.first
    lightning_peft.inject(model, r=2)
    assert model.first is first
    assert type(model) is Stack
