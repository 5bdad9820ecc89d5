"""The checks pass on healthy modules, catch seeded faults, and leave everything as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends import bnb4
from lightning_peft.engine.verification.verify import Check, Verification, default_step
from lightning_peft.errors import LifecycleError

from .reference import injected, randomize

NF4 = engine.quantization_config()
INT8 = engine.quantization_config(load_in_8bit=True)

NO_OP = "no effect before training"
THROUGH = "gradients pass through every quantized layer after an evaluation pass"
REACH = "gradients reach every adapter after an evaluation pass"
SAME = "gradients are the same before and after an evaluation pass"
ACT = "adapters act in evaluation as they do in training"
UNCHANGED = "base unchanged by evaluation, training and a step"
CHECKPOINT = "a checkpoint gives back everything that trains"
FILES = "adapter files give back every adapter"
IN_PLACE = "adapters are in place and switched on"


def results(verification: Verification) -> dict[str, bool | None]:
    return {check.name: check.passed for check in verification.checks}


def detail(verification: Verification, name: str) -> str:
    return next(check.detail for check in verification.checks if check.name == name)


HEALTHY = {
    "stack": (stack, {}),
    "nf4": (stack, {"quantization_config": NF4}),
    "int8": (stack, {"quantization_config": INT8}),
    "llama": (tiny_llama, {"quantization_config": NF4}),
    "gpt2": (tiny_gpt2, {"quantization_config": NF4}),
    "bf16": (lambda: stack().to(torch.bfloat16), {"quantization_config": NF4}),
    "dropout": (stack, {"lora_dropout": 0.5}),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_modules_pass(kind: str) -> None:
    build, settings = HEALTHY[kind]
    model = injected(build(), r=4, **settings)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    batch = token_batch() if kind in ("llama", "gpt2") else torch.randn(3, 96, dtype=dtype)
    verification = lightning_peft.verify(model, batch)
    assert verification.passed, verification
    assert results(verification) == {
        IN_PLACE: True,
        NO_OP: True,
        THROUGH: True if "quantization_config" in settings else None,
        REACH: True,
        SAME: True,
        ACT: True,
        CHECKPOINT: True,
        FILES: True,
        UNCHANGED: True,
    }
    verification.raise_if_failed()


def test_trained_adapters_may_have_an_effect() -> None:
    model = injected(stack(), r=4)
    randomize(model)
    assert results(lightning_peft.verify(model, torch.randn(3, 96)))[NO_OP] is None


# --- seeded faults -----------------------------------------------------------------------------


# What bitsandbytes' repacked layers do, right output, no way back, no error; and half of a way.
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_layer_that_passes_a_wrong_gradient_is_caught(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = bnb4.FourBitLayer.forward

    def cut(self: Any, input: Tensor) -> Tensor:
        return sound(self, share * input + (1 - share) * input.detach())

    model = injected(stack(), r=4, quantization_config=NF4)
    monkeypatch.setattr(bnb4.FourBitLayer, "forward", cut)
    verification = lightning_peft.verify(model, torch.randn(3, 96))
    assert results(verification)[THROUGH] is False
    assert "first, second" in detail(verification, THROUGH)
    # The adapter path next to the layer hides it from every look at adapters' gradients.
    assert results(verification)[REACH] is True
    with pytest.raises(LifecycleError, match="gradients pass through every quantized layer"):
        verification.raise_if_failed()


class Bypassing(nn.Module):
    """Keeps the parameter of a layer under a name of its own and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.called = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.direct = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.called(F.linear(x, self.direct)))


def test_a_dead_adapter_is_caught() -> None:
    model = injected(Bypassing(), r=2, target_modules=["layer", "called"])
    verification = lightning_peft.verify(model, torch.randn(3, 8))
    assert results(verification)[REACH] is False
    assert "layer: the module uses the weight without calling the layer" in detail(
        verification, REACH
    )
    assert not model.direct.requires_grad


def test_an_effect_before_training_is_caught() -> None:
    model = injected(stack(), r=4)
    handle = model.first.register_forward_hook(
        lambda layer, args, out: out + (0.0 if layer.disable_adapters else 1.0)
    )
    verification = lightning_peft.verify(model, torch.randn(3, 96))
    handle.remove()
    assert results(verification)[NO_OP] is False
    assert "loss differs by" in detail(verification, NO_OP)


@pytest.mark.parametrize("quantized", [{}, {"quantization_config": NF4}], ids=["dense", "nf4"])
def test_a_changed_base_is_caught(quantized: dict) -> None:
    model = injected(stack(), r=4, **quantized)

    def step(module: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            stored = module.second._parameters["weight"]
            if quantized:
                stored.quant_state.absmax.view(-1)[0] += 1
            else:
                stored[0, 0] += 1
        return module(batch).pow(2).mean()

    verification = lightning_peft.verify(model, torch.randn(3, 96), step)
    assert results(verification)[UNCHANGED] is False
    assert detail(verification, UNCHANGED) == "changed: second.weight"


def test_adapters_that_do_not_train_are_caught() -> None:
    model = injected(stack(), r=4)
    for param in engine.all_adapter_parameters(model):
        param.requires_grad_(False)
    verification = lightning_peft.verify(model, torch.randn(3, 96))
    assert results(verification)[REACH] is False
    assert "no adapter requires gradients" in detail(verification, REACH)


# --- no false alarms ---------------------------------------------------------------------------


class Idle(nn.Module):
    """One layer is never called, one is fed with zeros, one is behind a gate that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.starved, self.gated = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.used(x) + self.starved(x * 0) + self.gate * self.gated(x)
        return self.head(hidden)


@pytest.mark.parametrize("quantized", [{}, {"quantization_config": NF4}], ids=["dense", "nf4"])
def test_idle_layers_are_reported_without_a_failure(quantized: dict) -> None:
    model = injected(Idle(), r=2, **quantized)
    verification = lightning_peft.verify(model, torch.randn(3, 8))
    assert verification.passed, verification
    assert detail(verification, REACH) == (
        "2 tensors; the loss does not depend on unused, starved, gated"
    )


def test_random_numbers_in_the_step_do_not_count_as_an_effect() -> None:
    model = injected(stack(), r=4)

    def step(module: nn.Module, batch: Tensor) -> Tensor:
        noise = torch.randn_like(batch) + random.random() + np.random.rand()
        return module(batch + noise).pow(2).mean()

    assert results(lightning_peft.verify(model, torch.randn(3, 96), step))[NO_OP] is True


def test_the_effect_is_not_checked_with_a_loss_that_is_not_finite() -> None:
    model = injected(stack(), r=4)
    x = torch.full((3, 96), float("nan"))
    assert results(lightning_peft.verify(model, x))[NO_OP] is None


# --- everything is put back ---------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.register_buffer("replaced", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = self.replaced + 1
        return self.head(self.norm(self.first(x)))


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    model = injected(Normed(), r=2, lora_dropout=0.1)
    model(torch.randn(4, 8)).sum().backward()
    model.train()
    model.norm.eval()
    grads = {n: p.grad for n, p in model.named_parameters()}
    grad_values = {n: g.clone() for n, g in grads.items() if g is not None}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [child.training for child in model.modules()]
    batch = torch.randn(4, 8)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    replaced, kept = model.replaced, model.replaced.clone()
    calls = []

    def step(module: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        random.random(), np.random.rand()
        with torch.no_grad():
            module.head.weight.add_(1)  # as a teacher that follows its student would
        if fails and len(calls) == 4:
            raise KeyError
        return module(batch).pow(2).mean()

    if fails:
        with pytest.raises(KeyError):
            lightning_peft.verify(model, batch, step)
    else:
        lightning_peft.verify(model, batch, step)
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert all(torch.equal(grads[n], value) for n, value in grad_values.items())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.replaced is replaced
    assert torch.equal(replaced, kept)
    assert [child.training for child in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert (np.random.get_state()[1] == streams[2]).all()
    assert not model.first._parameters["weight"].requires_grad


# --- the step, the lifecycle and the words ------------------------------------------------------


class WithStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = stack()

    def training_step(self, batch: Tensor, batch_index: int) -> dict[str, Tensor]:
        return {"loss": self.inner(batch).mean()}


def test_default_step_finds_the_loss() -> None:
    x = torch.randn(3, 96)
    module = WithStep()
    assert torch.equal(default_step(module, x), module.inner(x).mean())
    assert torch.equal(default_step(stack_ := stack(), x), stack_(x).pow(2).mean())
    assert torch.equal(default_step(stack_, [x]), stack_(x).pow(2).mean())
    llama, batch = tiny_llama(), token_batch()
    assert torch.equal(default_step(llama, batch), llama(**batch).loss)
    bare = {"input_ids": batch["input_ids"]}
    assert torch.equal(default_step(llama, bare), llama(**bare).logits.pow(2).mean())


def test_merged_adapters_are_not_verified() -> None:
    model = injected(stack(), r=2)
    lightning_peft.merge(model)
    with pytest.raises(LifecycleError, match="unmerge"):
        lightning_peft.verify(model, torch.randn(3, 96))


def test_the_result_reads_line_by_line() -> None:
    verification = Verification(
        [Check("a", True, "x"), Check("b", None, "y"), Check("c", False, "z")]
    )
    assert str(verification).splitlines() == ["ok   a: x", "--   b: y", "FAIL c: z"]
    assert not verification.passed
    with pytest.raises(LifecycleError, match=r"verification failed:\n  - c: z$"):
        verification.raise_if_failed()
