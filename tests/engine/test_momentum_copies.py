"""Momentum teachers and target networks: copies whose adapters follow, and whose base stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.momentum_copies import find_momentum_copies
from lightning_peft.errors import LifecycleError

from .reference import injected, randomize, relative_error

NF4 = engine.quantization_config(None)
QUANTIZATION = pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])


class Pair(nn.Module):
    def __init__(self, freeze: bool = True) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
        self.teacher = copy.deepcopy(self.student).requires_grad_(not freeze)
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.student(x))


def mean(model: Pair, momentum: float = 0.9) -> None:
    with torch.no_grad():
        for slow, fast in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            slow.data = slow.data * momentum + fast.data * (1 - momentum)


def adapters(part: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in engine.adapter_parameters(part).items()}


def base_of(model: nn.Module) -> dict[str, Tensor]:
    frozen, named = engine.require_record(model).frozen, dict(model.named_parameters())
    return {n: named[n].detach().clone() for n in frozen}


@QUANTIZATION
@pytest.mark.parametrize("freeze", [True, False])
def test_the_teacher_is_the_average_of_the_adapters_on_the_same_base(quantization, freeze) -> None:
    model, x = Pair(freeze), torch.randn(8, 64)
    lightning_peft.inject(model, r=4, quantization_config=quantization)
    assert all(
        torch.equal(value, adapters(model.student)[name])
        for name, value in adapters(model.teacher).items()
    )
    randomize(model.student)
    before, student, base = adapters(model.teacher), adapters(model.student), base_of(model)
    mean(model)
    for name, value in adapters(model.teacher).items():
        assert relative_error(value, before[name] * 0.9 + student[name] * 0.1) < 1e-6
    now = base_of(model)
    assert [name for name, value in base.items() if not torch.equal(value, now[name])] == []
    mean(model, 0.0)
    model.eval()
    assert torch.equal(model.teacher(x), model.student(x))
    engine.check_momentum_copies(model)


def test_only_a_frozen_copy_stops_training() -> None:
    frozen, free = Pair(freeze=True), Pair(freeze=False)
    for model in (frozen, free):
        lightning_peft.inject(model, r=4)
        assert all(p.requires_grad for p in engine.adapter_parameters(model.student).values())
    assert not any(p.requires_grad for p in engine.adapter_parameters(frozen.teacher).values())
    assert all(p.requires_grad for p in engine.adapter_parameters(free.teacher).values())
    lightning_peft.set_adapter(frozen, "default")
    assert not any(p.requires_grad for p in engine.adapter_parameters(frozen.teacher).values())
    held = {id(p) for p in free.student.parameters()}
    engine.freeze_unoptimized_copies(free, held)
    assert not any(p.requires_grad for p in engine.adapter_parameters(free.teacher).values())


def test_a_copy_that_trains_too_goes_on_training() -> None:
    model = injected(Pair(freeze=False), r=4)
    engine.freeze_unoptimized_copies(model, {id(p) for p in model.parameters()})
    assert all(p.requires_grad for p in engine.adapter_parameters(model.teacher).values())


@QUANTIZATION
def test_names_states_and_copies_stay_complete(quantization) -> None:
    model = injected(Pair(), r=4, quantization_config=quantization)
    assert {n for n, _ in model.teacher.named_parameters()} >= {"0.weight", "1.weight", "1.bias"}
    assert "0.weight" in model.teacher.state_dict()
    assert len(list(model.teacher.parameters())) == 4
    assert len(list(model.teacher[1].parameters())) == 2  # nothing but base: all of it
    assert isinstance(model.teacher, nn.Sequential)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(list(again.teacher.parameters())) == 4
        assert type(again.teacher) is type(model.teacher)
    lightning_peft.unload(model)
    assert type(model.teacher) is nn.Sequential
    assert len(list(model.teacher.parameters())) == 6


def test_averaging_codes_past_the_parameters_is_found_out() -> None:
    model = injected(Pair(), r=4, quantization_config=NF4)
    engine.check_momentum_copies(model)
    states = model.teacher.state_dict().values(), model.student.state_dict().values()
    with torch.no_grad():
        for slow, fast in [*zip(*states, strict=True)] * 20:
            slow.copy_(slow * 0.9999 + fast * 0.0001)
    with pytest.raises(LifecycleError, match=r"'teacher' follows 'student'(.|\n)*parameters\(\)"):
        engine.check_momentum_copies(model)


def test_what_is_no_copy() -> None:
    repeated = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 3)
    assert find_momentum_copies(repeated) == []
    zeros = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    for param in zeros.parameters():
        nn.init.zeros_(param)
    assert find_momentum_copies(zeros) == []
    shared = nn.ModuleDict({"a": nn.Linear(4, 4)})
    shared["b"] = shared["a"]
    assert find_momentum_copies(shared) == []
    other = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    assert find_momentum_copies(other) == []
    assert find_momentum_copies(nn.ModuleDict({"a": nn.Linear(4, 4, device="meta")})) == []


def test_a_single_layer_may_be_a_copy() -> None:
    model = nn.ModuleDict({"actor": nn.Linear(64, 64), "head": nn.Linear(64, 2)})
    model["target"] = copy.deepcopy(model["actor"]).requires_grad_(False)
    lightning_peft.inject(model, r=4, target_modules=["actor", "target"])
    randomize(model)
    for slow, fast in zip(model["target"].parameters(), model["actor"].parameters(), strict=True):
        slow.data.copy_(fast.data)
    x = torch.randn(2, 64)
    assert torch.equal(model["target"](x), model["actor"](x))
    assert stored_parameter(model["target"], "weight") is not stored_parameter(
        model["actor"], "weight"
    )
    assert F.linear(x, model["target"].weight).shape == (2, 64)
