"""Adapters on convolutions of every kind, dense and 4-bit, against PEFT and against algebra."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends.bnb4 import FourBitConvolution
from lightning_peft.engine.backends.conversion import quantize
from lightning_peft.engine.layers.lora import LoraConvolution
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.errors import UnsupportedError

from .reference import randomize, relative_error

NF4 = engine.quantization_config(None)
INT8 = engine.quantization_config(None, load_in_8bit=True)


class Padding(nn.Conv2d):
    """Pads by itself, as timm's ``Conv2dSame`` does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 2, 1, 1)))


class Standardizing(nn.Conv2d):
    """Computes with a standardized weight, as residual nets with group norm do."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
        return F.conv2d(x, flat.view_as(self.weight), self.bias, self.stride, self.padding)


LAYERS = {
    "1d": lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1),
    "2d": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "2d pointwise": lambda: nn.Conv2d(8, 12, 1, bias=False),
    "2d without batch": lambda: nn.Conv2d(8, 12, 3),
    "2d dilated": lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2),
    "2d circular": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
    "2d same": lambda: nn.Conv2d(8, 12, (3, 4), padding="same"),
    "2d valid": lambda: nn.Conv2d(8, 12, (3, 2), padding="valid"),
    "3d": lambda: nn.Conv3d(8, 12, (1, 2, 3), padding=(0, 1, 1)),
    "1d up": lambda: nn.ConvTranspose1d(8, 12, 4, stride=2, padding=1),
    "2d up": lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1, dilation=2),
    "3d up": lambda: nn.ConvTranspose3d(8, 12, 2, stride=(1, 2, 1), bias=False),
}
OWN = {
    "padding": lambda: Padding(8, 12, 3),
    "standardizing": lambda: Standardizing(8, 12, 3, padding=1),
}


def adapted(make, quantization=None, **given) -> nn.Sequential:
    model = nn.Sequential(make())
    given = {"r": 4, "target_modules": ["0"], **given}
    lightning_peft.inject(model, quantization_config=quantization, **given)
    randomize(model)
    return model


def batch_for(kind: str) -> Tensor:
    spatial = 2 if kind in OWN else int(kind[0])
    return torch.randn(*(() if "without" in kind else (2,)), 8, *(9, 8, 7)[:spatial])


def dense_copy(make, layer) -> nn.Module:
    """A plain layer with the weight that ``layer`` computes with."""
    dense = make()
    with torch.no_grad():
        dense.weight.copy_(layer.effective_weight())
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_the_summed_weight(kind, quantization) -> None:
    model = adapted(LAYERS[kind], quantization)
    layer = model[0]
    assert isinstance(layer, LoraConvolution)
    assert isinstance(layer, FourBitConvolution) == (quantization is not None)
    dense = dense_copy(LAYERS[kind], layer)
    mine = batch_for(kind).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    assert relative_error(model(mine), dense(theirs)) < 1e-6
    model(mine).pow(2).sum().backward()
    dense(theirs).pow(2).sum().backward()
    assert relative_error(mine.grad, theirs.grad) < 1e-5
    # By the chain rule through W + s B A, whose gradient the dense layer has.
    a, b = (factor.detach().requires_grad_() for factor in layer.factors("default"))
    if "up" in kind:
        delta = torch.einsum("ir...,or->io...", a, b.flatten(1))
    else:
        delta = torch.einsum("ri...,or->oi...", a, b.flatten(1))
    (delta * 2).backward(dense.weight.grad)
    for factor, expected in zip(layer.factors("default"), (a, b), strict=True):
        assert relative_error(factor.grad, expected.grad) < 1e-5
    assert stored_parameter(layer, "weight").grad is None


@pytest.mark.parametrize("init", [True, "gaussian"])
@pytest.mark.parametrize("kind", [*LAYERS, *OWN])
def test_fresh_adapters_change_nothing_bit_for_bit(kind, init) -> None:
    model = nn.Sequential({**LAYERS, **OWN}[kind]())
    x = batch_for(kind)
    before = model(x)
    lightning_peft.inject(model, r=4, target_modules=["0"], init_lora_weights=init)
    assert torch.equal(model(x), before)
    assert all(
        layer.has_no_effect() and layer.factors("default")[0].any()
        for layer in engine.adapted_layers(model).values()
    )


# A class of one's own is not quantized.
MERGED = [*((kind, q) for kind in LAYERS for q in (None, NF4)), ("standardizing", None)]


@pytest.mark.parametrize(("kind", "quantization"), MERGED)
def test_merged_and_back(kind, quantization) -> None:
    make = {**LAYERS, **OWN}[kind]
    model, x = adapted(make, quantization), batch_for(kind)
    stored = stored_parameter(model[0], "weight").detach().clone()
    expected = model(x)
    lightning_peft.merge(model)
    assert type(stored_parameter(model[0], "weight")) is nn.Parameter
    assert relative_error(model(x), expected) < 1e-5
    lightning_peft.unmerge(model)
    again = stored_parameter(model[0], "weight")
    same = torch.equal if quantization is not None else torch.allclose
    assert again.shape == stored.shape
    assert same(again, stored)
    assert relative_error(model(x), expected) < 1e-5
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    assert type(model[0]) is type(make())
    assert relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize("kind", ["2d", "1d up"])
def test_autograd_keeps_no_dequantized_kernel(kind) -> None:
    model, kept = adapted(LAYERS[kind], NF4), []
    x = batch_for(kind).requires_grad_()

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    kernel = model[0].effective_weight().shape
    assert kept
    assert not [t for t in kept if t.shape == kernel]


@pytest.mark.parametrize("kind", ["2d", "2d up"])
def test_gradients_of_gradients_pass_a_quantized_kernel(kind) -> None:
    model, x = adapted(LAYERS[kind], NF4), batch_for(kind).double().float().requires_grad_()
    dense = dense_copy(LAYERS[kind], model[0])
    penalties = []
    for net in (model, dense):
        (gradient,) = torch.autograd.grad(net(x).pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.pow(2).sum(), x)
        penalties.append(second)
    assert relative_error(*penalties) < 1e-5


def test_torch_func_goes_through_a_quantized_kernel() -> None:
    model, x = adapted(LAYERS["2d"], NF4), batch_for("2d")
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x), atol=1e-5, rtol=1e-4)


def test_evaluation_changes_neither_gradient_nor_codes() -> None:
    model, x = adapted(LAYERS["2d"], NF4), batch_for("2d").requires_grad_()
    codes = stored_parameter(model[0], "weight").clone()
    model(x).sum().backward()
    before, x.grad = x.grad, None
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert torch.equal(x.grad, before)
    assert torch.equal(stored_parameter(model[0], "weight"), codes)


def test_the_code_table_is_that_of_bitsandbytes() -> None:
    conv = nn.Conv2d(8, 64, 3)
    expected, state = bnb.functional.quantize_4bit(
        conv.weight.data.flatten(1).contiguous(), quant_type="nf4", compress_statistics=True
    )
    dense = bnb.functional.dequantize_4bit(expected, state).view_as(conv.weight)
    quantize(conv, NF4)
    assert torch.equal(stored_parameter(conv, "weight").data, expected)
    assert torch.equal(conv.effective_weight(), dense)
    assert conv.weight.shape == dense.shape
    copied = copy.deepcopy(conv)
    assert torch.equal(copied.effective_weight(), dense)
    x = torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert copied(x).dtype == torch.bfloat16
        assert relative_error(copied(x), F.conv2d(x, dense, conv.bias)) < 1e-2


def test_the_weight_of_a_grouped_convolution_is_not_read_with_its_adapter() -> None:
    model = adapted(lambda: nn.Conv2d(8, 12, 3, groups=4))
    with pytest.raises(UnsupportedError, match="grouped"):
        model[0].weight + 0
    up = nn.Sequential(nn.ConvTranspose2d(8, 12, 3, groups=4))
    with pytest.raises(UnsupportedError, match="groups=4"):
        lightning_peft.inject(up, r=4, target_modules=["0"])


class Net(nn.Module):
    """A segmentation net: no linear layer at all, and a last convolution as its head."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.depthwise(self.down(x))))


@pytest.mark.parametrize("quantization", [None, NF4], ids=["dense", "nf4"])
def test_without_linear_layers_the_convolutions_are_adapted(quantization) -> None:
    model = Net()
    report = lightning_peft.inject(model, r=4, quantization_config=quantization)
    (part,) = report.parts
    assert set(engine.adapted_layers(model)) == {"down.0", "up"}
    assert part.heads == {"out": "trainable"}
    assert part.quantized == (0 if quantization is None else 2)
    verification = lightning_peft.verify(model, torch.randn(2, 3, 8, 8))
    assert verification.passed, verification


def test_eight_bits_are_for_linear_layers() -> None:
    with pytest.raises(UnsupportedError, match="Nothing to quantize"):
        lightning_peft.inject(Net(), r=4, quantization_config=INT8)


def test_peft_wraps_dense_kernels_only() -> None:
    wrapped = {"peft_config": LoraConfig(r=4, lora_bias=True, target_modules=["down.0"])}
    with pytest.raises(UnsupportedError, match="Nothing to quantize"):
        lightning_peft.inject(Net(), quantization_config=NF4, **wrapped)
    model = Net()
    assert not lightning_peft.inject(model, **wrapped).parts[0].in_place
    verification = lightning_peft.verify(model, torch.randn(2, 3, 8, 8))
    assert verification.passed, verification


def test_a_second_adapter_on_a_quantized_kernel() -> None:
    model, x = adapted(LAYERS["2d"], NF4), batch_for("2d")
    first = model(x)
    lightning_peft.inject(
        model, r=2, target_modules=["0"], adapter_name="second", quantization_config=NF4
    )
    assert torch.equal(model(x), first)
    lightning_peft.set_adapter(model, "second")
    with lightning_peft.disable_adapters(model):
        base = model(x)
    assert torch.equal(model(x), base)
    lightning_peft.set_adapter(model, "default")
    assert torch.equal(model(x), first)
