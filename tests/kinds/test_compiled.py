"""Nets of many kinds under ``torch.compile``, those that read weights among them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft
from lightning_peft import engine
from lightning_peft.compat.torch import compiled_late

from . import sequence, vision

NF4 = engine.quantization_config(None)
SERIES, IMAGES = (2, 6, sequence.WIDTH), (2, 3, 16, 16)
NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "transformer encoder": (lambda: sequence.TransformerForecaster(dropout=0.0), SERIES),
    "attention": (sequence.AttentionPooling, SERIES),
    "tied weights": (sequence.Autoencoder, SERIES),
    "fused qkv": (vision.FusedViT, IMAGES),
    "cnn": (vision.ResNet, IMAGES),
    "embeddings": (sequence.Tagger, (2, 8)),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net_and_input(kind: str) -> tuple[nn.Module, Any]:
    make, shape = NETS[kind]
    if len(shape) == 2:
        return make(), torch.randint(1, 64, shape)
    return make(), torch.randn(shape)


def test_only_functions_wait_for_their_first_call(monkeypatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    module = nn.Linear(1, 1)

    def double(x: int) -> int:
        return 2 * x

    with compiled_late():
        late = torch.compile(dynamic=False)(double)
        assert torch.compile(model=module) is module
    assert compiled == [module]
    assert late(2) == 4
    assert compiled == [module, double]


@pytest.mark.parametrize(
    "quantization",
    [pytest.param(None, id="lora", marks=pytest.mark.long), pytest.param(NF4, id="qlora")],
)
@pytest.mark.parametrize("kind", NETS)
def test_compiled_is_the_same(kind, quantization) -> None:
    net, x = net_and_input(kind)
    given = {"target_modules": ["words", "places", "project"]} if kind == "embeddings" else {}
    lightning_peft.inject(net, r=4, quantization_config=quantization, **given)
    tensors = list(engine.adapter_parameters(net).values())
    with torch.no_grad():
        for param in tensors:
            param.normal_(std=0.1)
    net.eval()
    compiled = torch.compile(net, backend="aot_eager")
    found = {}
    for name, module in (("plain", net), ("compiled", compiled)):
        output = module(x)
        found[name] = [output, *torch.autograd.grad(output.pow(2).sum(), tensors)]
        with torch.no_grad():
            found[name].append(module(x))
    for mine, theirs in zip(found["compiled"], found["plain"], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_compiled_blocks_are_the_same(bits: int) -> None:
    """By torch's own compiler; checkpointed, blocks run without it, and the log says so."""
    model = llama(bits)
    expected = gradients(model)
    for block in model.model.layers:
        block.compile()
    for mine, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_run_without_their_compilation() -> None:
    model = llama(4)
    expected = gradients(model)
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    done = engine.checkpoint_activations(model, True)
    words = "2 LlamaDecoderLayer of LlamaForCausalLM, without their torch.compile"
    assert done.descriptions == [words]
    for mine, theirs in zip(gradients(model), expected, strict=True):
        assert torch.equal(mine, theirs)


def llama(bits: int) -> Any:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).train()
    given = {16: None, 8: {"load_in_8bit": True}, 4: {"load_in_4bit": True}}[bits]
    config = None if given is None else engine.quantization_config(given)
    lightning_peft.inject(model, r=4, quantization_config=config)
    with torch.no_grad():
        for param in engine.all_adapter_parameters(model):
            param.normal_(std=0.1)
    return model


def gradients(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(12)[None]
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in engine.all_adapter_parameters(model))]
