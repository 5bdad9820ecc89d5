"""Frozen 4-bit and 8-bit weights: exact, unchanged by use, and open to gradients."""

from __future__ import annotations

import copy
import sys

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from torch.nn import functional as F
from toy_backend import ToyConfig
from transformers.pytorch_utils import Conv1D

import lightning_peft
from lightning_peft import engine
from lightning_peft.compat.bitsandbytes import prequantized
from lightning_peft.engine.backends.bnb4 import FOUR_BIT, FourBitLayer
from lightning_peft.engine.backends.conversion import quantize
from lightning_peft.engine.backends.registry import (
    parameter_count,
    quantization_constants,
    storage_bytes,
)

from .reference import dequantized_by_torch, relative_error

NF4 = engine.quantization_config()
INT8 = engine.quantization_config(load_in_8bit=True)
# Multiples of what bitsandbytes packs on CPUs (64 inputs, 32 outputs), and sizes that crash there.
SIZES = [(64, 32), (128, 64), (96, 10), (33, 7)]


def layer_of(features: tuple[int, int], config=NF4, **kwargs) -> nn.Linear:
    layer = nn.Linear(*features, **kwargs)
    quantize(layer, config)
    return layer


def packed(layer: nn.Module) -> list[Tensor]:
    stored = layer._parameters["weight"]
    return [stored.data.clone(), *(c.clone() for c in quantization_constants(stored))]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def input_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    layer(x).pow(2).sum().backward()
    return x.grad


@pytest.mark.parametrize("features", SIZES, ids=str)
@pytest.mark.parametrize("config", [NF4, INT8, ToyConfig()], ids=["nf4", "int8", "toy"])
def test_output_and_gradient_are_those_of_the_dequantized_weight(features, config) -> None:
    layer = layer_of(features, config)
    x = torch.randn(2, 5, features[0])
    weight = layer.weight + 0
    assert relative_error(layer(x), F.linear(x, weight, layer.bias)) < 1e-5
    exact = F.linear(x, weight, layer.bias).detach() * 2 @ weight
    assert relative_error(input_gradient(layer, x), exact) < 1e-5


@pytest.mark.parametrize("features", SIZES, ids=str)
@pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
def test_evaluation_changes_neither_gradient_nor_base(features, config) -> None:
    layer = layer_of(features, config)
    x = torch.randn(4, features[0])
    gradient, output, before = input_gradient(layer, x), layer(x), packed(layer)
    for _ in range(2):
        layer.eval()
        with torch.no_grad():
            assert relative_error(layer(x), output) < 1e-6
        layer.state_dict()
        layer.train()
        assert torch.equal(input_gradient(layer, x), gradient)
    assert same(packed(layer), before)


@pytest.mark.parametrize("features", [(128, 64), (192, 32)], ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["nf4", "nf4-dq"])
@pytest.mark.parametrize("used", ["fresh", "evaluated", "evaluated and saved"])
def test_layers_of_bitsandbytes_are_made_safe_even_when_repacked(features, double, used) -> None:
    x = torch.randn(4, features[0])
    donor = bnb.nn.Linear4bit(*features, quant_type="nf4", compress_statistics=double).to("cpu")
    loaded = dequantize_4bit(donor.weight.data, donor.weight.quant_state)
    model = nn.ModuleDict({"layer": donor, "head": nn.Linear(features[1], 2)})
    donor.support_avx512bf16_for_cpu = True
    if used != "fresh":
        with torch.no_grad():
            model.eval()["layer"](x)
        assert donor.weight.quant_state.packing_format_for_cpu, "the hazard did not happen"
        model.train()
    if used == "evaluated and saved":
        model.state_dict()
    lightning_peft.inject(model, r=2, target_modules=["layer"])
    layer = model["layer"]
    assert isinstance(layer, FourBitLayer)
    with lightning_peft.disable_adapters(model):
        weight, before = layer.weight + 0, packed(layer)
    # Repacking rounds the block constants to bfloat16, which nothing can undo.
    assert relative_error(weight, loaded) < (1e-6 if used == "fresh" else 5e-3)
    gradient = input_gradient(layer, x)
    with torch.no_grad():
        model.eval()["layer"](x)
    model.state_dict()
    model.train()
    assert torch.equal(input_gradient(layer, x), gradient)
    exact = F.linear(x, weight, layer.bias).detach() * 2 @ weight
    assert relative_error(gradient, exact) < 1e-5
    assert same(packed(layer), before)


def test_the_hazard_is_real_without_this_package() -> None:
    """If this fails, bitsandbytes has fixed its CPU repacking, and the care taken here can go."""
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = True
    x = torch.randn(4, 64)
    assert input_gradient(layer, x).any()
    with torch.no_grad():
        layer.eval()(x)
    probe = x.clone().requires_grad_()
    layer.train()(probe).sum().backward()
    assert probe.grad is None


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [64, 128])
def test_weights_and_products_are_those_of_codes_and_constants(size, kind, double) -> None:
    fields = {"compress_statistics": double, "quant_type": kind}
    for width in (32, 48, 64, 96, 100, 33, 128):
        # More blocks than a constant of constants is for, and a last block that is not whole.
        dense = torch.randn(401, width) * torch.rand(401, 1).exp2()
        codes, state = quantize_4bit(dense, blocksize=size, **fields)
        stored = prequantized(codes, quant_state=state, **fields)
        exact = dequantized_by_torch(codes, state)
        assert torch.allclose(FOUR_BIT.dequantize(stored), exact, rtol=1e-5, atol=1e-6), width
        some = FOUR_BIT.dequantize_rows(stored, 3, 30)
        assert torch.allclose(some, exact[3:30], rtol=1e-5, atol=1e-6), width
        again = FOUR_BIT.requantize(stored, dense)
        assert torch.allclose(again, exact, rtol=1e-5, atol=1e-6), width
        for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            x = torch.randn(2, 3, width, dtype=dtype).requires_grad_()
            bias = torch.randn(401, dtype=dtype)
            product = FOUR_BIT.matmul(None, x, stored, bias)
            product.sum().backward()
            expected = x.float() @ exact.t() + bias.float()
            assert product.dtype == x.grad.dtype == dtype
            assert relative_error(product, expected) < error, (width, dtype)
            assert relative_error(x.grad, exact.sum(0).expand(2, 3, -1)) < error, (width, dtype)


@pytest.mark.skipif(
    (sys.platform, torch.backends.cpu.get_cpu_capability()) != ("linux", "AVX512"),
    reason="bitsandbytes dequantizes in another way on this CPU",
)
def test_bitsandbytes_takes_constants_of_other_blocks_without_this_package() -> None:
    """If this fails, bitsandbytes counts blocks right, and ``bnb4._is_misread`` can go."""
    for width in (32, 48, 96):
        codes, state = quantize_4bit(torch.randn(64, width), quant_type="nf4")
        exact = dequantized_by_torch(codes, state)
        assert relative_error(dequantize_4bit(codes, state), exact) > 0.05
        x = torch.randn(2, width)
        product = bnb.matmul_4bit(x, codes, quant_state=state)
        assert relative_error(product, x @ exact.t()) > 0.05


def test_other_dtypes_leave_the_stored_bias_alone() -> None:
    for config in (NF4, INT8):
        layer = layer_of((96, 10), config)
        bias = layer.bias.detach().clone()
        out = layer(torch.randn(3, 96, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16
        assert layer.bias.dtype == torch.float32
        assert torch.equal(layer.bias, bias)


def test_autocast_and_compute_dtype_decide_the_product() -> None:
    layer = layer_of((96, 10))
    x = torch.randn(3, 96)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layer(x)
    assert rounded.dtype == torch.bfloat16
    assert 0 < relative_error(rounded, exact) < 0.02
    layer.compute_dtype = torch.bfloat16
    low = layer(x)
    assert low.dtype == torch.float32
    assert torch.equal(low, rounded.float())


def test_a_trained_bias_gets_the_gradient_of_a_linear_layer() -> None:
    for config in (NF4, INT8):
        layer = layer_of((96, 10), config)
        x = torch.randn(2, 5, 96)
        weight, bias = layer.weight + 0, layer.bias.detach().clone().requires_grad_()
        F.linear(x, weight, bias).pow(2).sum().backward()
        layer(x).pow(2).sum().backward()
        assert relative_error(layer.bias.grad, bias.grad) < 1e-5


def test_a_wrong_input_size_is_an_error_as_in_a_dense_layer() -> None:
    layer = layer_of((96, 10))
    # bitsandbytes would multiply by the transposed weight.
    with pytest.raises(RuntimeError, match=r"\(3, 10\).*maps 96 to 10 features"):
        layer(torch.randn(3, 10))


def test_conv1d_keeps_its_orientation() -> None:
    dense = Conv1D(96, 64)
    x = torch.randn(3, 64)
    weight, expected = dense.weight.detach().clone(), dense(x)
    quantize(dense, NF4)
    assert isinstance(dense, Conv1D)
    assert dense.weight.shape == (64, 96)
    assert relative_error(dense.weight + 0, weight) < 0.12
    assert relative_error(dense(x), expected) < 0.12
    assert relative_error(dense(x), x @ (dense.weight + 0) + dense.bias) < 1e-6


def test_four_and_a_bit_bits_per_parameter() -> None:
    """NF4 is 4.5 bits, with double quantization 4.127: from the stored tensors, to the byte.

    Left out, as is usual: the code tables (16 and 256 numbers) and the offset of the second
    quantization, which each layer holds once whatever its size.
    """
    for double, bits in ((False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))):
        config = engine.quantization_config(bnb_4bit_use_double_quant=double)
        layer = layer_of((512, 256), config, bias=False)
        stored = layer._parameters["weight"]
        assert stored.quant_state.blocksize == 64
        assert parameter_count(stored) == 512 * 256
        assert storage_bytes(stored) * 8 == bits * 512 * 256
        constants = sum(c.numel() * c.element_size() for c in quantization_constants(stored))
        assert stored.numel() + constants == storage_bytes(stored)
    assert round(bits, 3) == 4.127


def test_eight_bits_and_one_scale_per_row() -> None:
    stored = layer_of((512, 256), INT8, bias=False)._parameters["weight"]
    assert storage_bytes(stored) == 512 * 256 + 256 * 4
    assert parameter_count(stored) == 512 * 256
    assert storage_bytes(torch.zeros(3, dtype=torch.bfloat16)) == 6


@pytest.mark.parametrize("bits", [4, 8])
def test_a_module_takes_its_own_state_and_that_of_no_other_base(bits) -> None:
    """As code does that goes back to the best weights."""
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    config = NF4 if bits == 4 else engine.quantization_config(load_in_8bit=True)
    lightning_peft.inject(module, r=2, quantization_config=config)
    x, best = torch.randn(3, 64), copy.deepcopy(module.state_dict())
    expected = module(x)
    nn.init.normal_(module[0].lora_B["default"].weight)
    module.load_state_dict(best)
    assert torch.equal(module(x), expected)
    best["0.weight"][0] ^= 1
    with pytest.raises(RuntimeError, match="values other than those of this module"):
        module.load_state_dict(best)
    assert torch.equal(module(x), expected)


def test_state_dict_holds_what_rebuilds_the_weight() -> None:
    layer = layer_of((96, 10))
    state = layer.state_dict()
    constants = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    rebuilt = bnb.nn.Params4bit.from_prequantized(state["weight"], constants, device="cpu")
    assert torch.equal(dequantized_by_torch(rebuilt.data, rebuilt.quant_state), layer.weight + 0)


@pytest.mark.parametrize("config", [NF4, INT8, ToyConfig()], ids=["nf4", "int8", "toy"])
def test_torch_func_goes_through_quantized_layers(config) -> None:
    """Per-sample gradients and directional derivatives, as in physics-informed losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    lightning_peft.inject(model, r=2, quantization_config=config)
    x, step = torch.randn(3, 64), torch.randn(3, 64)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x), atol=1e-5, rtol=1e-4)
    _, tangent = torch.func.jvp(model, (x,), (step,))
    (whole,) = torch.autograd.functional.jvp(model, x, step)[1:]
    torch.testing.assert_close(tangent, whole, atol=1e-5, rtol=1e-4)
