"""Nets of many kinds under ``torch.compile``, those that read weights among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft
from lightning_peft import engine

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


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
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
