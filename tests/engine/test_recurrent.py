"""LoRA on the matrices of recurrent layers: every layer, direction and projection of them."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import TargetModulesError, UnsupportedError

from .reference import adapted, injected, refused, relative_error

KINDS = {
    "lstm": partial(nn.LSTM, 6, 8, num_layers=2, bidirectional=True, proj_size=3),
    "gru": partial(nn.GRU, 6, 8, num_layers=2, batch_first=True, bias=False),
    "rnn": partial(nn.RNN, 6, 8, bidirectional=True, nonlinearity="relu"),
    "own class": lambda: Shifted(6, 8),
}
NAMED = {"target_modules": ["memory", "head"]}


class Shifted(nn.LSTM):
    """Reads one of its matrices by itself, and is computed by torch's code."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + self.weight_hh_l0.sum())


class Forecaster(nn.Module):
    """A recurrent layer, and a linear one behind it."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.memory = kind()
        width = self.memory(torch.zeros(1, 1, 6))[0].shape[-1]
        self.head, self.out = nn.Linear(width, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.head(self.memory(x)[0])))


def forecaster(kind: str) -> Forecaster:
    torch.manual_seed(0)
    return Forecaster(KINDS[kind])


def merged_by_hand(model: Any, kind: str) -> Forecaster:
    """A plain model whose matrices have ``s B A`` in them, with gradients to nothing."""
    plain = forecaster(kind)
    for name, param in plain.memory.named_parameters():
        if name.startswith("weight"):
            a, b = (getattr(model.memory, x)["default"][name].weight for x in ("lora_A", "lora_B"))
            param.data += 2.0 * (b @ a).detach()
    layer = model.head
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    plain.head.weight.data += 2.0 * (b @ a).detach()
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_and_trains_as_the_sum_does(kind: str, tmp_path: Path) -> None:
    model, x = adapted(partial(forecaster, kind), r=2, **NAMED), torch.randn(3, 5, 6)
    # Frozen, as kernels differ by rounding where a weight has a gradient.
    expected, base = merged_by_hand(model, kind), forecaster(kind).requires_grad_(False)
    assert relative_error(model(x), expected(x)) < 1e-6
    with lightning_peft.disable_adapters(model):
        assert model(x).equal(base(x))
    # Gradients are those of the sum, taken through the product by hand.
    model(x).square().sum().backward()
    expected(x).square().sum().backward()
    for name, param in expected.memory.named_parameters():
        if name.startswith("weight"):
            a, b = (getattr(model.memory, m)["default"][name].weight for m in ("lora_A", "lora_B"))
            assert relative_error(b.grad, 2.0 * param.grad @ a.t()) < 1e-4, name
            assert relative_error(a.grad, 2.0 * b.t() @ param.grad) < 1e-4, name
            assert model.memory._parameters[name].grad is None
    # Copies, files and merges.
    output = model(x).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double().float()):
        assert relative_error(other(x), output) < 1e-6
    lightning_peft.save_adapter(model, tmp_path)
    again = forecaster(kind)
    lightning_peft.load_adapter(again, tmp_path, is_trainable=True)
    assert again(x).equal(output)
    described, state = engine.describe(model), engine.trainable_state_dict(model)
    fresh = forecaster(kind)
    engine.inject_as_described(fresh, described)
    engine.load_trainable_state_dict(fresh, state)
    assert fresh(x).equal(output)
    report = lightning_peft.merge(model)
    assert report.worst_error < 1e-4
    assert relative_error(model(x), output) < 1e-6
    lightning_peft.unmerge(model)
    assert relative_error(model(x), output) < 1e-6
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    assert type(model.memory) is type(base.memory)
    assert relative_error(model(x), output) < 1e-6


def test_a_matrix_that_is_read_has_the_adapter_in_it() -> None:
    model = adapted(partial(forecaster, "gru"), r=2, **NAMED)
    layer, plain = model.memory, merged_by_hand(model, "gru").memory
    assert relative_error(layer.weight_hh_l1, plain.weight_hh_l1) < 1e-6
    assert layer.weight_hh_l1.requires_grad
    assert relative_error(layer.all_weights[0][0], plain.weight_ih_l0) < 1e-6
    assert not hasattr(layer, "weight")
    with lightning_peft.disable_adapters(model):
        assert layer.weight_hh_l1 is layer._parameters["weight_hh_l1"]
    names = [name for name, _ in layer.named_parameters() if "lora" not in name]
    assert names == [name for name, _ in plain.named_parameters()]


def test_half_precision_keeps_its_adapters_in_float32() -> None:
    model = adapted(lambda: forecaster("lstm").bfloat16(), r=2, **NAMED)
    x = torch.randn(3, 5, 6)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in engine.adapter_parameters(model).values()} == {torch.float32}
    assert relative_error(model(x.bfloat16()).float(), merged_by_hand(model, "lstm")(x)) < 0.05


def test_verification_and_the_meta_device_know_them() -> None:
    model, x = injected(forecaster("lstm"), r=2, **NAMED), torch.randn(3, 5, 6)
    assert lightning_peft.report(model).parts[0].adapted == {"memory": 1, "head": 1}
    made = lightning_peft.verify(model, x, lambda module, batch: module(batch).square().mean())
    assert made.passed, made
    with torch.device("meta"):
        outline = Forecaster(KINDS["lstm"])
    lightning_peft.inject(outline, r=2, **NAMED)
    shapes = {name: param.shape for name, param in engine.adapter_parameters(outline).items()}
    assert shapes["memory.lora_A.default.weight_hr_l1_reverse.weight"] == (2, 8)
    assert shapes["memory.lora_B.default.weight_ih_l0.weight"] == (32, 2)


def test_what_they_do_not_take_is_refused() -> None:
    model = forecaster("lstm")
    with refused(model, UnsupportedError, "a LSTM keeps several weights"):
        lightning_peft.inject(model, LoraConfig(target_modules=["memory"], use_dora=True))
    with refused(model, UnsupportedError, "'pissa' is for linear layers, not a LSTM"):
        lightning_peft.inject(model, target_modules=["memory"], init_lora_weights="pissa")
    for biases in ("all", "lora_only"):
        with refused(
            model, UnsupportedError, f"bias='{biases}' trains what is called `bias`, and a"
        ):
            lightning_peft.inject(model, target_modules=["memory"], bias=biases)
    injected(forecaster("gru"), target_modules=["memory"], bias="all")
    nn.utils.parametrizations.weight_norm(model.memory, "weight_hh_l0")
    with refused(model, UnsupportedError, "a ParametrizedLSTM keeps several weights"):
        lightning_peft.inject(model, target_modules=["memory"])
    alone = nn.ModuleDict({"memory": nn.LSTM(4, 4), "head": nn.Linear(4, 2)})
    with refused(alone, TargetModulesError, "recurrent layers only get one by name"):
        lightning_peft.inject(alone)


def test_nothing_takes_the_place_of_a_matrix() -> None:
    model = injected(forecaster("lstm"), r=2, **NAMED)
    with pytest.raises(UnsupportedError, match="would be replaced"):
        nn.utils.weight_norm(model.memory, "weight_hh_l0")
