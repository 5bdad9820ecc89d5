"""Code that reads a weight instead of calling the layer gets the weight with its adapter."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.layers.weight_view import WeightView
from lightning_peft.errors import UnsupportedError

from .reference import adapted, injected, randomize, relative_error

NF4 = {"quantization_config": engine.quantization_config()}


class FusedReader(nn.Module):
    """Uses the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(96, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x.to(self.qkv.weight.dtype), self.qkv.weight, self.qkv.bias))


@pytest.mark.parametrize("quantized", [{}, NF4], ids=["dense", "nf4"])
def test_a_read_weight_is_that_of_the_call(quantized: dict) -> None:
    model = adapted(FusedReader, **quantized)
    x = torch.randn(3, 96)
    called = model.head(model.qkv(x))
    assert relative_error(model(x), called) < 1e-6
    grads = []
    for forward in (lambda: model.head(model.qkv(x)), lambda: model(x)):
        model.zero_grad()
        forward().pow(2).sum().backward()
        grads.append(
            [model.qkv.lora_A["default"].weight.grad, model.qkv.lora_B["default"].weight.grad]
        )
    for by_call, by_read in zip(*grads, strict=True):
        assert relative_error(by_read, by_call) < 1e-5


def test_a_dense_weight_without_running_adapters_is_the_parameter() -> None:
    model = FusedReader()
    parameter = model.qkv.weight
    lightning_peft.inject(model, r=4)
    assert isinstance(model.qkv.weight, WeightView)
    with lightning_peft.disable_adapters(model):
        assert model.qkv.weight is parameter
    lightning_peft.merge(model)
    assert model.qkv.weight is parameter


def test_questions_about_a_weight_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = injected(FusedReader().to(torch.bfloat16), r=4, **NF4)

    def fail(self: object) -> Tensor:
        raise AssertionError("computed")

    monkeypatch.setattr(type(model.qkv), "effective_weight", fail)
    weight = model.qkv.weight
    assert weight.shape == (64, 96)
    assert weight.size(1) == 96
    assert weight.dtype == torch.bfloat16
    assert weight.device.type == "cpu"
    assert (weight.ndim, weight.numel(), len(weight)) == (2, 6144, 64)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert weight.grad is None
    assert isinstance(weight, nn.Parameter)
    assert weight.quant_state.quant_type == "nf4"


def test_a_view_takes_part_in_arithmetic() -> None:
    model = adapted(FusedReader)
    layer = model.qkv
    exact = layer._parameters["weight"] + layer.delta_weight("default")
    torch.testing.assert_close(layer.weight + 0, exact)
    torch.testing.assert_close(layer.weight.t(), exact.t())
    torch.testing.assert_close(torch.stack([layer.weight, layer.weight])[1], exact)
    torch.testing.assert_close(layer.weight[3:5], exact[3:5])
    assert layer.weight.norm().item() == pytest.approx(exact.norm().item())


WRITES = {
    "mul_": lambda weight: weight.mul_(2),
    "data": lambda weight: weight.data.clamp_(0),
    "init": nn.init.zeros_,
    "init by name": nn.init.normal_,
    "out": lambda weight: torch.mul(weight, 2, out=weight),
    "foreach": lambda weight: torch._foreach_mul_([weight], 2.0),
    "item": lambda weight: weight.__setitem__(0, 1.0),
    "set data": lambda weight: setattr(weight, "data", torch.zeros(64, 96)),
    "+=": lambda weight: weight.__iadd__(1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_into_a_computed_weight_is_refused(write) -> None:
    model = injected(FusedReader(), r=4)
    before = model.qkv._parameters["weight"].clone()
    with pytest.raises(UnsupportedError, match="the change would be lost"):
        write(model.qkv.weight)
    assert torch.equal(model.qkv._parameters["weight"], before)


class Product(torch.autograd.Function):
    """A product as kernels of other packages compute it: from the address of a weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        address = ctypes.cast(weight.data_ptr(), ctypes.POINTER(ctypes.c_float))
        values = torch.tensor(address[: weight.numel()]).view(weight.shape)
        return x @ values.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


@pytest.mark.parametrize("settings", [{}, NF4, {"use_dora": True}], ids=["dense", "nf4", "dora"])
def test_functions_with_a_backward_pass_of_their_own_train_the_adapter(settings: dict) -> None:
    model = adapted(FusedReader, **settings)
    x = torch.randn(3, 96)
    found = []
    for product in (F.linear, Product.apply):
        inputs = x.clone().requires_grad_()
        model.zero_grad()
        output = product(inputs, model.qkv.weight)
        output.pow(2).sum().backward()
        grads = [p.grad for n, p in model.qkv.named_parameters() if "lora" in n]
        assert all(grad is not None and grad.any() for grad in grads)
        found.append([output.detach(), inputs.grad, *grads])
    for theirs, ours in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("inside", ["both", "forward", "backward"])
def test_the_backward_pass_is_of_the_adapters_that_ran(inside: str) -> None:
    model = adapted(FusedReader, **NF4)
    found = []
    for product in (F.linear, Product.apply):
        inputs = torch.linspace(-1, 1, 288).view(3, 96).requires_grad_()
        model.zero_grad()
        off = lightning_peft.disable_adapters
        with nullcontext() if inside == "backward" else off(model):
            output = product(inputs, model.qkv.weight)
            if inside == "both":
                output.pow(2).sum().backward()
        with off(model) if inside == "backward" else nullcontext():
            if inside != "both":
                output.pow(2).sum().backward()
        grads = [p.grad for n, p in model.qkv.named_parameters() if "lora" in n]
        assert all((grad is None) == (inside != "backward") for grad in grads)
        found.append([output.detach(), inputs.grad, *(x for x in grads if x is not None)])
    for theirs, ours in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_freezing_code_reaches_the_parameter() -> None:
    model = injected(FusedReader(), r=4)
    model.qkv.weight.requires_grad_(True)
    assert model.qkv._parameters["weight"].requires_grad
    model.qkv.weight.requires_grad = False
    assert not model.qkv._parameters["weight"].requires_grad


def test_attention_of_torch_uses_the_adapter_of_its_output() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, batch_first=True)}).eval()
    x = torch.randn(2, 5, 32)
    lightning_peft.inject(model, r=4, target_modules=["out_proj"])
    attention = model["attention"]
    with torch.no_grad():
        before = attention(x, x, x)[0]
    randomize(model)
    layer = attention.out_proj
    with torch.no_grad():
        fast = attention(x, x, x)[0]
    assert not torch.allclose(fast, before, atol=1e-4)
    slow = attention(x, x, x)[0]
    assert relative_error(fast, slow) < 1e-5
    slow.sum().backward()
    assert layer.lora_A["default"].weight.grad.any()
    assert layer.lora_B["default"].weight.grad.any()
    # The projection is linear, so the adapter's share is its delta on what the base projects.
    weight, delta = layer._parameters["weight"].detach(), layer.delta_weight("default")
    inner = torch.linalg.solve(weight, (before - layer.bias.detach()).mT).mT
    torch.testing.assert_close(fast - before, inner @ delta.t(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("quantized", [{}, NF4], ids=["dense", "nf4"])
def test_encoder_layer_of_torch_scores_the_same_in_eval_as_in_train(quantized: dict) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)})
    x = torch.randn(2, 5, 64)
    lightning_peft.inject(
        model, r=4, target_modules=["linear1", "linear2", "out_proj"], **quantized
    )
    with torch.no_grad():
        before = model.eval()["encoder"](x)
    randomize(model)
    trained = model.train()["encoder"](x)
    with torch.no_grad():
        scored = model.eval()["encoder"](x)
    assert relative_error(scored, trained) < 1e-5
    assert relative_error(scored, before) > 1e-2
    # Its sum alone is constant behind the last norm.
    (trained * x).sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert len(grads) == 12
    assert all(grad.any() for grad in grads)


def test_t5_casts_activations_to_the_dtype_of_a_quantized_weight() -> None:
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=40, dropout_rate=0.0, decoder_start_token_id=0, **size)
    model = T5ForConditionalGeneration(config).eval()
    ids = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.arange(8).view(2, 4)}
    dense = model(**ids).logits
    lightning_peft.inject(model, r=4, **NF4)
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo.weight, WeightView)
    # Cast to the dtype of the packed codes, activations would be zeros and ones.
    assert relative_error(model(**ids).logits, dense) < 0.3
