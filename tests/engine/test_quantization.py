"""Turning weights into quantized ones and back is exact and leaves the layer object alone."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from models import stack
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends import nf4_cpu
from lightning_peft.engine.backends.bnb4 import FOUR_BIT, FourBitLayer
from lightning_peft.engine.backends.bnb8 import EightBitLayer
from lightning_peft.engine.backends.conversion import (
    adopt_prequantized,
    convert_to_dense,
    quantize,
    requantize,
    restore_quantized,
)
from lightning_peft.errors import UnsupportedError
from lightning_peft.plan.prediction import plan_memory

from .reference import dequantized_by_torch, injected, relative_error

NF4 = engine.quantization_config(bnb_4bit_use_double_quant=False)
INT8 = engine.quantization_config(load_in_8bit=True)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_bitsandbytes(kind: str, double: bool, dtype: torch.dtype) -> None:
    layer = nn.Linear(96, 10).to(dtype)
    dense = layer.weight.detach().clone()
    config = engine.quantization_config(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    quantize(layer, config)
    codes, state = quantize_4bit(dense, blocksize=64, compress_statistics=double, quant_type=kind)
    stored = layer._parameters["weight"]
    assert torch.equal(stored.data, codes)
    assert torch.equal(stored.quant_state.absmax, state.absmax)
    assert torch.equal(layer.weight + 0, dequantized_by_torch(codes, state).to(dtype))
    assert (layer.weight + 0).dtype == dtype
    assert isinstance(layer, (FourBitLayer, bnb.nn.Linear4bit))
    assert not stored.requires_grad


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (33, 97), (3, 131)], ids=str)
def test_codes_made_in_chunks_are_those_of_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, kind: str, double: bool, shape: tuple[int, int]
) -> None:
    # The last piece is whole, ends within a block, or has an odd number of weights.
    monkeypatch.setattr(nf4_cpu, "CHUNK", 128)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dense = torch.randn(shape).to(dtype)
        dense[0] = 0
        config = engine.quantization_config(
            bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
        )
        made = FOUR_BIT.quantize(dense, config, torch.device("cpu"))
        theirs: Any = bnb.nn.Params4bit(
            dense, requires_grad=False, quant_type=kind, compress_statistics=double
        )
        theirs = theirs.to("cpu")
        assert type(made) is type(theirs)
        assert torch.equal(made.data, theirs.data)
        mine, wanted = dict(vars(made)), dict(vars(theirs))
        state, other = mine.pop("quant_state"), wanted.pop("quant_state")
        assert mine == wanted
        assert state.nested is other.nested is double
        assert str(state.as_dict()) == str(other.as_dict())
        for name, value in other.as_dict(packed=True).items():
            assert torch.equal(state.as_dict(packed=True)[name], value)


def test_the_codes_do_not_depend_on_the_default_dtype() -> None:
    dense = torch.randn(64, 64).bfloat16()
    theirs, _ = quantize_4bit(dense, quant_type="nf4")
    nf4_cpu.matches_bitsandbytes.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert nf4_cpu.matches_bitsandbytes("nf4")
        made = FOUR_BIT.quantize(dense, NF4, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(made.data, theirs)


def test_unsupported_values_and_types_fall_back_to_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert nf4_cpu.matches_bitsandbytes("nf4")
    assert not nf4_cpu.matches_bitsandbytes("fp4")
    dense = torch.randn(64, 64)
    dense[3, 5], dense[40, 1] = float("nan"), float("inf")
    theirs, state = quantize_4bit(dense, quant_type="nf4")
    made = FOUR_BIT.quantize(dense, NF4, torch.device("cpu"))
    assert torch.equal(made.data, theirs)
    assert str(made.quant_state.absmax.tolist()) == str(state.absmax.tolist())
    # A bitsandbytes with other levels than those that are compared with.
    bounds = nf4_cpu._bounds()
    monkeypatch.setattr(nf4_cpu, "_bounds", lambda: [bounds[0] + 1e-6, *bounds[1:]])
    nf4_cpu.matches_bitsandbytes.cache_clear()
    try:
        assert not nf4_cpu.matches_bitsandbytes("nf4")
    finally:
        nf4_cpu.matches_bitsandbytes.cache_clear()


@pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
def test_dense_and_back_is_bit_identical(config) -> None:
    layer = nn.Linear(96, 10)
    quantize(layer, config)
    kind, names = type(layer), list(layer.state_dict())
    stored = layer._parameters["weight"]
    codes, x = stored.data.clone(), torch.randn(3, 96)
    expected, attributes = layer(x), set(layer.__dict__)
    undo = convert_to_dense(layer, layer.weight + 0)
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert set(layer.__dict__) == set(nn.Linear(1, 1).__dict__)
    assert relative_error(layer(x), expected) < 1e-6
    restore_quantized(layer, undo)
    assert type(layer) is kind
    assert set(layer.__dict__) == attributes
    assert list(layer.state_dict()) == names
    assert torch.equal(layer._parameters["weight"].data, codes)
    assert torch.equal(layer(x), expected)


def test_layers_of_bitsandbytes_become_plain_linear_when_dense() -> None:
    for kind in (bnb.nn.LinearNF4(64, 32), bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)):
        layer = kind.to("cpu")
        adopt_prequantized(layer)
        x = torch.randn(3, 64)
        expected = layer(x)
        convert_to_dense(layer, layer.weight + 0)
        assert type(layer) is nn.Linear
        assert relative_error(layer(x.to(layer.weight.dtype)).float(), expected) < 2e-3


def test_eight_bit_layers_of_bitsandbytes_compute_the_same_when_adopted() -> None:
    for used in (False, True):
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
        x = torch.randn(3, 64)
        expected = layer.train()(x) if used else None
        adopt_prequantized(layer)
        assert isinstance(layer, EightBitLayer)
        out = layer(x)
        if used:
            assert torch.equal(out, expected)
        assert relative_error(out, x @ (layer.weight.float() + 0).t() + layer.bias) < 1e-3


def test_adopting_twice_is_adopting_once() -> None:
    layer = bnb.nn.LinearNF4(64, 32).to("cpu")
    adopt_prequantized(layer)
    kind = type(layer)
    adopt_prequantized(layer)
    assert type(layer) is kind
    assert kind.__mro__.count(FourBitLayer) == 1
    dense = nn.Linear(2, 2)
    adopt_prequantized(dense)
    assert type(dense) is nn.Linear


def test_adopting_keeps_a_chosen_compute_dtype() -> None:
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    adopt_prequantized(layer)
    assert layer.compute_dtype == torch.bfloat16
    free = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    adopt_prequantized(free)
    assert free.compute_dtype is None


@pytest.mark.parametrize(
    "layer", [bnb.nn.LinearNF4(64, 32), bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True)]
)
def test_layers_that_are_not_quantized_yet_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match="still holds its dense weight"):
        adopt_prequantized(layer)


def test_requantize_gives_what_the_layer_would_store() -> None:
    for layer in (nn.Linear(96, 64), Conv1D(64, 96)):
        dense = layer.weight.detach().clone()
        quantize(layer, NF4)
        assert torch.equal(requantize(layer, dense), layer.weight + 0)


def test_unsupported_layers_have_a_reason() -> None:
    class Own(nn.Linear):
        pass

    class OwnConvolution(nn.Conv1d):
        pass

    cases = [
        (Own(4, 4), NF4, "it is a Own"),
        (OwnConvolution(2, 2, 1), INT8, "since a subclass may compute in its own way"),
        (nn.Embedding(2, 2), NF4, "it is a Embedding"),
        (nn.Conv1d(2, 2, 1), INT8, "8-bit products for linear layers only"),
        (Conv1D(4, 4), INT8, "stores its weight transposed"),
        (nn.Linear(4, 4, device="meta"), NF4, "meta device"),
    ]
    for layer, config, reason in cases:
        assert reason in engine.backend_for(config).unsupported_reason(layer)
        kept = type(layer), layer._parameters["weight"]
        with pytest.raises(UnsupportedError, match=reason):
            quantize(layer, config)
        assert (type(layer), layer._parameters["weight"]) == kept
    assert engine.backend_for(INT8).unsupported_reason(nn.Linear(4, 4)) is None


def test_casting_a_module_leaves_the_codes_alone() -> None:
    model = injected(stack(), r=4, quantization_config=engine.quantization_config())
    codes = model.first._parameters["weight"].data.clone()
    weight = model.first.weight + 0
    for cast in (lambda: model.to(torch.bfloat16), model.float, model.cpu):
        cast()
        assert torch.equal(model.first._parameters["weight"].data, codes)
    with lightning_peft.disable_adapters(model):
        assert torch.equal(model.first.weight + 0, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_products_are_those_of_the_dequantized_weight_and_keep_no_input(dtype) -> None:
    net = nn.Sequential(nn.Linear(48, 32, bias=False), nn.Linear(32, 16)).to(dtype)
    for layer in net:
        quantize(layer, INT8)
    x = torch.randn(2, 5, 48, dtype=dtype).requires_grad_()
    hidden = net[0](x)
    out, storage = net[1](hidden), StorageWeakRef(hidden.untyped_storage())
    del hidden
    # Checkpointing, and layers that share an input, have nothing to free.
    assert storage.expired()
    out.square().sum().backward()
    weights = [(layer.weight + 0).to(dtype) for layer in net]
    y, bias = (tensor.detach().clone().requires_grad_() for tensor in (x, net[1].bias))
    expected = nn.functional.linear(nn.functional.linear(y, weights[0]), weights[1], bias)
    expected.square().sum().backward()
    error = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(out, expected) < error
    assert relative_error(x.grad, y.grad) < error
    assert relative_error(net[1].bias.grad, bias.grad) < error


def test_8_bit_codes_changed_before_the_backward_pass_are_noticed() -> None:
    layer = nn.Linear(64, 32)
    quantize(layer, INT8)
    out = layer(torch.randn(2, 64, requires_grad=True))
    layer._parameters["weight"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_memory_of_8_bit_layers_is_planned() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, dtype="float32",
    )  # fmt: skip
    planned = {
        name: plan_memory(config, batch_size=1, seq_len=8, quantization=given).breakdown
        for name, given in {"int8": {"load_in_8bit": True}, "nf4": {}}.items()
    }
    # Per layer q and o, k and v, and three of the MLP; a float32 scale for each row.
    codes = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    assert planned["int8"]["weights_quantized"] == codes + 4 * rows
    assert planned["nf4"]["weights_quantized"] < 0.8 * codes
    assert planned["int8"]["weights_dense"] == planned["nf4"]["weights_dense"]


@pytest.mark.gpu
def test_quantizing_a_layer_that_is_on_the_gpu() -> None:
    for config in (NF4, INT8):
        layer = nn.Linear(128, 64, device="cuda")
        dense = layer.weight.detach().clone()
        quantize(layer, config)
        assert layer._parameters["weight"].device.type == "cuda"
        assert relative_error(layer.weight + 0, dense) < 0.12
