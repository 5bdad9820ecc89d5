"""The layer and its adapter as one step of autograd: PEFT's numbers, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_gpt2, tiny_llama, token_batch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends.bnb4 import FourBitLayer
from lightning_peft.engine.layers import fused
from lightning_peft.engine.layers.lora import LoraLayer

from .reference import copy_adapter, peft_model, randomize, relative_error, without_repacking

NF4 = {
    "dense": None,
    "nf4": engine.quantization_config(),
    "nf4 in float32": engine.quantization_config(bnb_4bit_compute_dtype=torch.float32),
    "fp4": engine.quantization_config(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
}


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Notes for each call of a linear layer with adapters whether it was fused."""
    calls: list[bool] = []
    before = fused.fused_output

    def noting(*args):
        out = before(*args)
        calls.append(out is not None)
        return out

    monkeypatch.setattr("lightning_peft.engine.layers.lora.fused_output", noting)
    return calls


def adapted(layer: nn.Module, kind: str = "dense", **lora) -> nn.Module:
    """Returns one adapted layer with random adapters, in train mode."""
    holder = nn.ModuleDict({"layer": layer})
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["layer"], **lora}
    engine.inject(holder, quantization_config=NF4[kind], **settings)
    randomize(holder)
    return holder["layer"]


def by_hand(layer: LoraLayer, x: Tensor, mask: Tensor | None = None, p: float = 0.0) -> Tensor:
    """Returns ``W x + b + s B A drop(x)`` with gradients, in float64."""
    kept = x.double() if mask is None else x.double() * mask / (1 - p)
    a, b = (factor.double() for factor in layer.factors("default"))
    stored = layer._parameters["weight"]
    four_bit = isinstance(layer, FourBitLayer)
    weight = FourBitLayer.effective_weight(layer) if four_bit else stored
    rows = fused.as_rows(layer, weight).double()
    bias = None if layer.bias is None else layer.bias.double()
    scaling = layer.adapter_settings["default"].scaling
    return F.linear(x.double(), rows, bias) + F.linear(F.linear(kept, a), b) * scaling


def gradients(layer: LoraLayer, out: Tensor, x: Tensor) -> list[Tensor]:
    wanted = [x, *layer.factors("default")]
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    found = torch.autograd.grad((out * weights.to(out.dtype)).sum(), wanted)
    return [found[0], found[1], found[2]]


LAYERS = {
    "linear": lambda: nn.Linear(96, 10),
    "without bias": lambda: nn.Linear(64, 32, bias=False),
    "conv1d": lambda: Conv1D(10, 96),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("make", LAYERS)
def test_output_and_gradients_are_those_of_the_formula(make, kind, shape, p, rslora, taken):
    layer = adapted(LAYERS[make](), kind, lora_dropout=p, use_rslora=rslora)
    x = torch.randn(*shape, fused.as_rows(layer, layer.weight).shape[1], requires_grad=True)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), p) != 0
    expected = by_hand(layer, x, mask, p)
    assert taken == [True]
    assert out.shape == expected.shape
    assert relative_error(out, expected) < 1e-6
    for mine, exact in zip(gradients(layer, out, x), gradients(layer, expected, x), strict=True):
        assert mine.dtype == torch.float32
        assert relative_error(mine, exact) < 1e-6


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kind", NF4)
def test_bfloat16_is_right_up_to_its_rounding(kind, p, autocast, taken):
    dtype = torch.float32 if autocast else torch.bfloat16
    layer = adapted(nn.Linear(128, 64).to(dtype), kind, lora_dropout=p)
    x = torch.randn(6, 128).to(dtype).requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    assert taken == [True]
    assert out.dtype == torch.bfloat16
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), p) != 0
    expected = by_hand(layer, x, mask, p)
    assert relative_error(out, expected) < 0.01
    mine = gradients(layer, out, x)
    assert [g.dtype for g in mine] == [dtype, torch.float32, torch.float32]
    for got, exact in zip(mine, gradients(layer, expected, x), strict=True):
        assert relative_error(got, exact) < 0.01


def losses_and_gradients(model: nn.Module, batch: dict[str, Tensor], **autocast):
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {name.removeprefix("base_model.model."): g for name, g in found.items()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_llama_trains_as_in_peft(quantized, p, checkpointed, taken):
    model = tiny_llama().train()
    config = LoraConfig(r=4, lora_dropout=p, target_modules="all-linear")
    if quantized:
        engine.inject(model, config, quantization_config=NF4["nf4 in float32"])
        lightning_peft.unload(model)
    reference = without_repacking(peft_model(model, config)).train()
    engine.inject(model, config)
    randomize(model)
    copy_adapter(model, reference)
    if checkpointed:
        engine.checkpoint_activations(model, True)
    batch = token_batch()
    loss, mine = losses_and_gradients(model, batch, enabled=False)
    expected, theirs = losses_and_gradients(reference, batch, enabled=False)
    assert taken
    assert all(taken)
    torch.testing.assert_close(loss, expected)
    assert mine.keys() == theirs.keys()
    assert len(mine) == 28
    for name, gradient in mine.items():
        assert relative_error(gradient, theirs[name]) < 1e-5, name


def test_under_autocast_a_llama_trains_as_in_peft_up_to_rounding():
    model = tiny_llama().train()
    config = LoraConfig(r=4, target_modules="all-linear")
    reference = peft_model(model, config)
    engine.inject(model, config)
    randomize(model)
    copy_adapter(model, reference)
    batch = token_batch()
    loss, mine = losses_and_gradients(model, batch, enabled=True)
    expected, theirs = losses_and_gradients(reference, batch, enabled=True)
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    for name, gradient in mine.items():
        assert relative_error(gradient, theirs[name]) < 0.05, name


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 4), lambda: Conv1D(4, 5)])
def test_derivatives_and_those_of_derivatives_are_right(make):
    holder = nn.ModuleDict({"layer": make().double()})
    engine.inject(holder, r=2, lora_alpha=6, target_modules=["layer"])
    layer = holder["layer"]
    layer.bias.requires_grad_()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(f.shape, dtype=torch.float64, requires_grad=True)
            for f in layer.factors("default"))  # fmt: skip
    frozen = fused.FrozenMatmul(layer, torch.float64, torch.float64, None)

    def function(x, a, b, bias):
        stored = layer._parameters["weight"]
        return fused.FusedLora.apply(x, a, b, bias, stored, frozen, 3.0, 0.0)

    assert torch.autograd.gradcheck(function, (x, a, b, layer.bias))
    assert torch.autograd.gradgradcheck(function, (x, a, b, layer.bias))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_derivatives_of_derivatives_pass_dropout_and_autocast(kind):
    layer = adapted(nn.Linear(64, 32), kind, lora_dropout=0.3)
    x = torch.randn(4, 64, requires_grad=True)

    def penalty(out: Tensor) -> list[Tensor]:
        (slope,) = torch.autograd.grad(out.double().pow(2).sum(), x, create_graph=True)
        return list(torch.autograd.grad(slope.double().pow(2).sum(), layer.factors("default")))

    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        mine = penalty(layer(x))
    torch.manual_seed(1)
    mask = F.dropout(torch.ones_like(x), 0.3) != 0
    for got, exact in zip(mine, penalty(by_hand(layer, x, mask, 0.3)), strict=True):
        assert relative_error(got, exact) < 0.05


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_only_what_requires_a_gradient_gets_one(kind):
    layer = adapted(nn.Linear(64, 32), kind)
    x = torch.randn(4, 64)
    layer(x).sum().backward()
    assert layer._parameters["weight"].grad is None
    assert layer.bias.grad is None
    assert all(f.grad.any() for f in layer.factors("default"))
    for factor in layer.factors("default"):
        factor.grad = None
        factor.requires_grad_(False)
    assert not layer(x).requires_grad
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.any()
    assert all(f.grad is None for f in layer.factors("default"))


def test_a_trained_bias_gets_its_gradient():
    layer = adapted(nn.Linear(64, 32), bias="lora_only")
    x = torch.randn(2, 3, 64)
    layer(x).pow(2).sum().backward()
    torch.testing.assert_close(layer.bias.grad, 2 * by_hand(layer, x).float().sum((0, 1)).detach())


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_less_is_kept_for_the_backward_pass_than_by_autograd(kind, taken):
    layer = adapted(nn.Linear(256, 128).bfloat16(), kind, lora_dropout=0.1)
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)

    def kept(fuse: bool) -> int:
        sizes: dict[int, int] = {}
        known = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in known:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = layer(x) if fuse else layer(input=x)
        assert taken.pop() is fuse
        assert out.requires_grad
        return sum(sizes.values())

    # A mask of one byte per input, and four numbers per row.
    assert kept(True) == 64 * 256 + 64 * 4 * 2
    assert kept(False) > 4 * 64 * 256


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_changed_weight_is_noticed_before_the_backward_pass(kind):
    layer = adapted(nn.Linear(64, 32), kind)
    out = layer(torch.randn(4, 64, requires_grad=True))
    with torch.no_grad():
        layer._parameters["weight"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def _two(layer, x):
    holder = nn.ModuleDict({"layer": layer})
    engine.inject(holder, r=2, target_modules=["layer"])
    engine.inject(holder, r=2, target_modules=["layer"], adapter_name="b")
    lightning_peft.set_adapter(holder, ["default", "b"])
    return layer(x)


def _off(layer, x):
    holder = nn.ModuleDict({"layer": layer})
    engine.inject(holder, r=2, target_modules=["layer"])
    with lightning_peft.disable_adapters(holder):
        return layer(x)


def _merged(layer, x):
    holder = nn.ModuleDict({"layer": layer})
    engine.inject(holder, r=2, target_modules=["layer"])
    lightning_peft.merge(holder)
    return layer(x)


def _hooked(layer, x):
    layer = adapted(layer, lora_dropout=0.2)
    layer.lora_dropout["default"].register_forward_hook(lambda *_: None)
    return layer(x)


def _trained(layer, x):
    layer = adapted(layer)
    layer._parameters["weight"].requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert layer._parameters["weight"].grad is not None
    return out


def _functional(layer, x):
    layer = adapted(layer)
    torch.func.grad(lambda x: layer(x).sum())(x)
    torch.func.jvp(layer, (x,), (x,))
    return torch.func.vmap(layer)(x)


def _eight_bit(layer, x):
    holder = nn.ModuleDict({"layer": layer})
    engine.inject(
        holder,
        r=2,
        target_modules=["layer"],
        quantization_config=engine.quantization_config(load_in_8bit=True),
    )
    return layer(x)


class Doubled(nn.Linear):
    """A subclass that computes in its own way."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _own(layer, x):
    return adapted(Doubled(64, 32))(x)


@pytest.mark.parametrize(
    "use", [_two, _off, _merged, _hooked, _trained, _functional, _eight_bit, _own]
)
def test_unsupported_cases_fall_back_to_separate_products(use, taken):
    out = use(nn.Linear(64, 32), torch.randn(3, 64))
    assert out.shape == (3, 32)
    assert taken
    assert not any(taken)


def test_inputs_that_do_not_fit_are_refused_by_torch():
    layer = adapted(nn.Linear(64, 32))
    for x in (torch.randn(3, 32), torch.randn(3, 64).double()):
        with pytest.raises(RuntimeError):
            layer(x)
    assert layer(torch.randn(0, 64)).shape == (0, 32)


def test_gpt2_and_a_copy_of_it_compute_the_same(taken):
    model = tiny_gpt2()
    engine.inject(model, r=4, quantization_config=NF4["nf4"])
    randomize(model)
    batch = token_batch()
    assert torch.equal(model(**batch).logits, copy.deepcopy(model)(**batch).logits)
    assert all(taken)


@pytest.mark.parametrize("shape", [(5, 32), (2, 5, 32)])
def test_the_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """As by the ``ReLU(inplace=True)`` of many vision models."""
    results = []
    for inplace in (False, True):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=inplace), nn.Linear(64, 8))
        engine.inject(module, r=4, target_modules=["0", "2"])
        randomize(module)
        output = module(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
        output.square().sum().backward()
        results.append([output, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
