"""Each check catches its own fault, seeded into a healthy module, and no check cries wolf."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from models import stack, tiny_llama, token_batch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends import bnb4
from lightning_peft.engine.layers import lora
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.engine.layers.mixin import LayerMixin
from lightning_peft.errors import LifecycleError

from .reference import injected
from .test_verification import (
    ACT,
    CHECKPOINT,
    FILES,
    IN_PLACE,
    NF4,
    NO_OP,
    REACH,
    SAME,
    THROUGH,
    UNCHANGED,
    detail,
    results,
)


def failed(verification: Any) -> set[str]:
    return {name for name, passed in results(verification).items() if passed is False}


# --- gradients and evaluation passes ------------------------------------------------------------


def test_a_layer_that_an_evaluation_breaks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' repacking: the first evaluation cuts the way back, without a sign of it."""
    sound = bnb4.FourBitLayer.forward

    def repacking(self: Any, input: Tensor) -> Tensor:
        if not (self.training or torch.is_grad_enabled()):
            self.repacked = True
        return sound(self, input.detach() if hasattr(self, "repacked") else input)

    model = injected(stack(), quantization_config=NF4)
    monkeypatch.setattr(bnb4.FourBitLayer, "forward", repacking)
    # Else a linear layer and its adapter are one step, which does not come by there.
    monkeypatch.setattr(lora, "fused_output", lambda *_: None)
    verification = lightning_peft.verify(model, torch.randn(3, 96))
    assert failed(verification) == {THROUGH, SAME}
    # The upper layer's own adapter still gets the gradient that it should.
    assert detail(verification, SAME) == (
        "changed: first.lora_A.default.weight, first.lora_B.default.weight"
    )
    assert not hasattr(model.first, "repacked")


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on other processors only")
def test_bitsandbytes_own_repacking_is_caught() -> None:
    model = stack()
    # With a bias the training step fails by itself, which nobody overlooks.
    model.second = nn.Linear(64, 96, bias=False)
    layer: Any = injected(model, quantization_config=NF4).second
    # What its own Linear4bit does in an evaluation; the layers here never do.
    layer._parameters["weight"].data, layer._parameters["weight"].quant_state = (
        _convert_weight_packed_for_cpu(
            layer._parameters["weight"].data, layer._parameters["weight"].quant_state
        )
    )
    assert engine.structural_problems(model) == [
        "second: bitsandbytes repacked the weight in an evaluation, and passes no gradients "
        "through it any more"
    ]
    verification = lightning_peft.verify(model, torch.randn(3, 96))
    assert failed(verification) == {IN_PLACE, THROUGH}
    assert detail(verification, THROUGH) == "wrong at: second"


def test_a_step_that_does_not_repeat_itself_does_not_fail() -> None:
    model, calls = injected(stack()), []

    def step(module: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        return module(batch).pow(2).mean() * len(calls)

    assert results(lightning_peft.verify(model, torch.randn(3, 96), step))[SAME] is None


# --- train and eval -----------------------------------------------------------------------------


class Encoder(nn.Module):
    """Layers with a fast path for evaluation that reads weights and calls no layer."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def test_a_fast_path_past_the_adapters_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = injected(Encoder(), target_modules=["linear1", "linear2"])
    batch = torch.randn(2, 4, 16)
    assert lightning_peft.verify(model, batch).passed
    stored = property(lambda layer: layer._parameters["weight"])
    monkeypatch.setattr(LayerMixin, "weight", stored)
    verification = lightning_peft.verify(model, batch)
    assert failed(verification) == {ACT}
    assert detail(verification, ACT) == (
        "evaluation reads the weight without the adapter: encoder.layers.0.linear1, "
        "encoder.layers.0.linear2"
    )


def test_adapters_that_are_ignored_in_eval_mode_are_caught(monkeypatch: Any) -> None:
    sound = LoraLayer.effective_adapters
    monkeypatch.setattr(
        LoraLayer, "effective_adapters", lambda layer: sound(layer) if layer.training else []
    )
    verification = lightning_peft.verify(injected(stack()), torch.randn(3, 96))
    assert ACT in failed(verification)
    assert detail(verification, ACT) == "called without effect in eval mode: first, second"


class Copying(nn.Module):
    """Evaluates with a copy of a weight that it made once."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.copy = self.inner.weight.detach().clone() if early else None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.head(self.inner(self.other(x)))
        if self.copy is None:
            self.copy = self.inner.weight.detach().clone()
        return self.head(F.linear(self.other(x), self.copy, self.inner.bias))


def test_a_stale_copy_of_a_weight_is_caught() -> None:
    model = injected(Copying(early=False))
    verification = lightning_peft.verify(model, torch.randn(3, 8))
    assert failed(verification) == {ACT}
    assert detail(verification, ACT) == "evaluation keeps a copy of an old weight: inner"
    assert model.copy is None


def test_a_layer_that_only_training_uses_is_reported() -> None:
    """It may be an auxiliary loss, which is right, or a copy from before the adapters."""
    verification = lightning_peft.verify(injected(Copying(early=True)), torch.randn(3, 8))
    assert results(verification)[ACT] is None
    assert "used in training only: inner" in detail(verification, ACT)
    alone = injected(Copying(early=True), target_modules=["inner"])
    verification = lightning_peft.verify(alone, torch.randn(3, 8))
    assert failed(verification) == {ACT}
    assert detail(verification, ACT) == "evaluation uses none of the adapted layers"


# --- the base -----------------------------------------------------------------------------------


def test_a_step_that_changes_the_base_is_caught() -> None:
    """A head that shares its memory with a frozen weight: the optimizer writes to both."""
    model = injected(stack())
    model.head.weight.data = model.second._parameters["weight"].data.view(-1)[:960].view(10, 96)
    before = model.second._parameters["weight"].clone()
    verification = lightning_peft.verify(model, torch.randn(3, 96))
    assert failed(verification) == {UNCHANGED}
    assert detail(verification, UNCHANGED) == "changed: second.weight"
    assert not torch.equal(model.second._parameters["weight"], before + 1)


class Drifting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        self.norm.running_mean += 1e-6
        return self.head(self.norm(hidden))


def test_frozen_statistics_that_change_are_caught() -> None:
    model = injected(Drifting())
    assert results(lightning_peft.verify(model, torch.randn(4, 8)))[UNCHANGED] is True
    model.norm.eval()
    verification = lightning_peft.verify(model, torch.randn(4, 8))
    assert failed(verification) == {UNCHANGED}
    assert detail(verification, UNCHANGED) == "changed: norm.running_mean"


def test_a_change_below_bfloat16_is_caught() -> None:
    model = injected(stack())

    def step(module: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            stored = module.first._parameters["weight"]
            stored[0, 0] = stored[0, 0].nextafter(torch.tensor(9.0))
        return module(batch).pow(2).mean()

    assert UNCHANGED in failed(lightning_peft.verify(model, torch.randn(3, 96), step))


# --- saving and loading -------------------------------------------------------------------------


class Forgetful(nn.Module):
    """Takes a key out of its state, as code that strips prefixes or filters names may."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.inner = stack()
        self.outside = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(self.inner(x))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.endswith(self.key)}


def test_a_checkpoint_that_loses_a_key_is_caught() -> None:
    model = injected(Forgetful("outside.bias"), adapt="inner")
    verification = lightning_peft.verify(model, torch.rand(3, 96))
    assert failed(verification) == {CHECKPOINT}
    assert detail(verification, CHECKPOINT) == "not given back: outside.bias"


@pytest.mark.parametrize("key", ["second.lora_B.default.weight", "head.bias"])
def test_keys_of_adapted_parts_stay_in_checkpoints(key: str) -> None:
    model = injected(Forgetful(key), adapt="inner")
    assert lightning_peft.verify(model, torch.rand(3, 96)).passed


def test_adapter_files_that_lose_a_key_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = injected(stack(), modules_to_save=["head"])
    assert lightning_peft.verify(model, torch.randn(3, 96)).passed
    monkeypatch.setattr(
        "lightning_peft.engine.files.adapter_format.saved_modules", lambda *args: []
    )
    verification = lightning_peft.verify(model, torch.randn(3, 96))
    assert failed(verification) == {FILES}
    assert re.search(r"missing: head.weight\s+- missing: head.bias", detail(verification, FILES))


def test_several_adapters_and_rewritten_bases_go_through_files() -> None:
    model = injected(injected(stack()), r=3, adapter_name="second", target_modules=["first"])
    verification = lightning_peft.verify(model, torch.randn(3, 96))
    assert verification.passed
    assert detail(verification, FILES).startswith("8 tensors, bit for bit")
    assert engine.require_record(model).active == ("default",)
    assert not model.first.lora_B["second"].weight.requires_grad
    assert model.first.lora_B["default"].weight.requires_grad
    rewritten = injected(stack(), init_lora_weights="pissa")
    verification = lightning_peft.verify(rewritten, torch.randn(3, 96))
    assert verification.passed, verification
    assert results(verification)[FILES] is None
    assert results(verification)[NO_OP] is None


# --- structure ----------------------------------------------------------------------------------


def switch_off(model: Any) -> None:
    model.first.disable_adapters = True


def replace_layer(model: Any) -> None:
    model.first = nn.Linear(96, 64)


def spoil(model: Any) -> None:
    with torch.no_grad():
        model.first.lora_A["default"].weight[0, 0] = float("nan")


def move_away(model: Any) -> None:
    model.first.lora_A.to("meta")


def convert_to_dense(model: Any) -> None:
    model.first.__class__ = nn.Linear


STRUCTURE = [
    (switch_off, "first: the adapter is switched off"),
    (replace_layer, "first: has no adapter any more"),
    (spoil, "first.lora_A.default.weight: has values that are not finite"),
    (move_away, "first.lora_A.default.weight: is on meta and its layer on cpu"),
    (convert_to_dense, "first: is not quantized any more"),
]


@pytest.mark.parametrize(("fault", "problem"), STRUCTURE)
def test_faults_are_seen_without_a_pass(fault: Any, problem: str) -> None:
    model = injected(stack(), quantization_config=NF4)
    assert engine.structural_problems(model) == []
    fault(model)
    assert any(found.startswith(problem) for found in engine.structural_problems(model))


def test_structure_is_part_of_the_verification() -> None:
    model = injected(stack())
    switch_off(model)
    assert IN_PLACE in failed(lightning_peft.verify(model, torch.randn(3, 96)))


# --- no false alarms ----------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.2, batch_first=True)
        self.norm, self.inner, self.head = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.norm(x + self.attention(x, x, x)[0])))


class Mixed(nn.Module):
    """Batch norm, dropout, a counter, a cache, an LSTM and a GRU next to linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.lstm, self.gru = nn.LSTM(16, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.head = nn.Linear(16, 3)
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        x = self.norm(self.dropout(torch.relu(self.first(x))))
        x = self.lstm(x)[0] + self.gru(x)[0]
        return self.head(F.dropout(self.second(x), 0.2, self.training))


class Auxiliary(nn.Module):
    """A layer that serves training alone, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aid, self.unused = nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.body(x))
        return self.head(hidden) + (self.aid(hidden) if self.training else 0)


class Convolutions(nn.Module):
    """Convolutions, one of them transposed, and an embedding next to a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 16)
        self.first, self.second = nn.Conv1d(4, 8, 3, padding=1), nn.ConvTranspose1d(8, 4, 3)
        self.norm, self.inner, self.head = nn.BatchNorm1d(4), nn.Linear(18, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embedding((x[:, 0, :1] * 3).long().abs() % 7)
        return self.head(self.inner(self.norm(self.second(torch.relu(self.first(x))))))


HEALTHY = {
    "convolutions": Convolutions,
    "encoder": Encoder,
    "attention": Attention,
    "mixed": Mixed,
    "auxiliary": Auxiliary,
}


@pytest.mark.parametrize("quantized", [{}, {"quantization_config": NF4}], ids=["dense", "nf4"])
@pytest.mark.parametrize("kind", HEALTHY)
def test_no_false_alarm(kind: str, quantized: dict) -> None:
    everything = {"target_modules": ["embedding", "first", "second", "inner"]}
    targets = everything if kind == "convolutions" else {}
    model = injected(HEALTHY[kind](), lora_dropout=0.2, **targets, **quantized)
    verification = lightning_peft.verify(model, torch.randn(3, 4, 16))
    assert verification.passed, verification
    doubtful = {name for name, passed in results(verification).items() if passed is None}
    expected = (set() if quantized else {THROUGH}) | ({ACT} if kind == "auxiliary" else set())
    assert doubtful == expected
    assert results(verification)[REACH] is True


class Distilling(nn.Module):
    """A teacher next to the adapted part that moves with every training step."""

    def __init__(self) -> None:
        super().__init__()
        self.student = stack()
        self.teacher = nn.Linear(96, 10).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(self.student.head.weight, alpha=0.1)
        self.log_dict({"teacher": self.teacher.weight.norm()})
        return (self.student(batch) - self.teacher(batch)).pow(2).mean()

    def log_dict(self, values: dict[str, Tensor]) -> None:
        raise RuntimeError("a verification logs nothing")


@pytest.mark.parametrize("own_step", [False, True])
def test_a_teacher_that_moves_passes_and_is_restored(own_step: bool) -> None:
    model = injected(Distilling(), adapt="student")
    before = model.teacher.weight.clone()
    step = (lambda module, batch: module.training_step(batch, 0)) if own_step else None
    verification = lightning_peft.verify(model, torch.randn(3, 96), step)
    assert verification.passed, verification
    assert results(verification)[SAME] is True
    assert torch.equal(model.teacher.weight, before)


def test_plain_attributes_are_put_back() -> None:
    model = injected(Mixed())
    model(torch.randn(3, 4, 16))
    seen = model.seen
    lightning_peft.verify(model, torch.randn(3, 4, 16))
    assert model.calls == 1
    assert model.seen is seen
    assert seen == [1]


def test_hooks_of_a_first_pass_are_put_back_with_what_says_that_they_are_there() -> None:
    class Counting(type(stack())):
        """Registers a hook in its first pass, as transformers does to collect hidden states."""

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "hooked"):
                self.hooked = True
                self.first.register_forward_hook(lambda *_: calls.append(1))
            return super().forward(x)

    calls: list[int] = []
    module = injected(Counting())
    assert lightning_peft.verify(module, torch.randn(2, 96)).passed
    assert not hasattr(module, "hooked")
    calls.clear()
    module(torch.randn(2, 96))
    assert calls == [1]


def test_a_number_of_passes_that_does_not_grow() -> None:
    counts = []
    for layers in (1, 3):
        model, calls = injected(tiny_llama(layers=layers)), []

        def step(module: nn.Module, batch: Any, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return module(**batch).loss

        assert lightning_peft.verify(model, token_batch(), step).passed
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 12


def test_compiled_modules_are_checked_as_written() -> None:
    model = injected(stack())
    batch = torch.randn(3, 96)
    compiled = torch.compile(model, backend="eager")
    model.eval()
    with torch.no_grad():
        compiled(batch)
    verification = lightning_peft.verify(model, batch, lambda _, x: compiled(x).pow(2).mean())
    assert verification.passed, verification
    assert results(verification)[ACT] is True


def test_failures_are_raised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = LoraLayer.effective_adapters
    monkeypatch.setattr(
        LoraLayer, "effective_adapters", lambda layer: sound(layer) if layer.training else []
    )
    model = injected(Drifting())
    model.norm.eval()
    with pytest.raises(LifecycleError, match=f"{ACT}(.|\n)*{UNCHANGED}"):
        lightning_peft.verify(model, torch.randn(4, 8)).raise_if_failed()
