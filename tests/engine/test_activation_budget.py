"""A budget for activations: what is kept fits into it, and no number changes."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import engine
from lightning_peft.compat.transformers import enable_gradient_checkpointing
from lightning_peft.engine.training import activation_budget
from lightning_peft.engine.training.activation_budget import (
    FULL,
    SAVE_ALL,
    SELECTIVE,
    ActivationBudget,
    BlockSizes,
    choose_levels,
    read_budget,
)
from lightning_peft.errors import ConfigError, UnsupportedError

from .test_activation_checkpointing import MODELS, WIDTH, Storages, adapted, loss_of, train

ROTATIONS = [
    [SAVE_ALL],
    [SELECTIVE],
    [FULL],
    [SELECTIVE, SAVE_ALL, FULL],
    [FULL, SELECTIVE, SELECTIVE],
]


def budget_of(module: nn.Module) -> ActivationBudget:
    """Returns the budget that the blocks of a module share."""
    found = {}
    for child in module.modules():
        own = child.__dict__.get("_activation_budget")
        function = child.__dict__.get("_gradient_checkpointing_func")
        own = own or (function.args[0] if function is not None else None)
        if own is not None:
            found[id(own)] = own
    (one,) = found.values()
    return one


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the levels, whatever the budget is."""

    def choose(levels: list[str]) -> None:
        def rotating(calls: list[BlockSizes], most: float) -> list[str]:
            return list(itertools.islice(itertools.cycle(levels), len(calls)))

        monkeypatch.setattr(activation_budget, "choose_levels", rotating)

    return choose


@pytest.mark.parametrize(("quantized", "bf16"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("kind", MODELS)
def test_no_number_changes(kind: str, quantized: bool, bf16: bool, chosen: Any) -> None:
    expected = train(adapted(kind, quantized), bf16)
    assert len(expected) > 20
    for levels in (None, *ROTATIONS):
        module = adapted(kind, quantized)
        if levels is not None:
            chosen(levels)
        done = engine.checkpoint_activations(module, "1TB" if levels else True)
        assert done.descriptions == [MODELS[kind][2]]
        found = train(module, bf16)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        if levels is not None:
            # The first of three passes measures.
            budget = budget_of(module)
            assert len(budget._levels) == len(budget._calls) == 3
        done.disable()
        assert engine.checkpoint_activations(module, "auto").descriptions == done.descriptions


def llama(length: int = 48, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, use_cache=False, **sizes, **heads)
    module = LlamaForCausalLM(config).to(dtype)
    engine.inject(module, r=4)
    return module.train()


def step(module: nn.Module, rows: int = 4, length: int = 48) -> tuple[int, float]:
    """Takes a step; returns the bytes between forward and backward, and the loss."""
    ids = torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(7))
    with Storages() as storages:
        loss = module(input_ids=ids, labels=ids).loss
        kept = storages.alive()
        loss.backward()
    return kept, loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_fits(dtype: torch.dtype) -> None:
    plain = llama(dtype=dtype)
    save_all, loss = step(plain)
    checkpointed = llama(dtype=dtype)
    engine.checkpoint_activations(checkpointed, True)
    least, _ = step(checkpointed)
    found = []
    for share in (0.9, 0.7, 0.5, 0.3, 0.1):
        module = llama(dtype=dtype)
        engine.checkpoint_activations(module, share)
        assert step(module) == (pytest.approx(least, rel=0.01), loss)
        kept, same = step(module)
        assert same == loss
        budget = budget_of(module)
        everything = sum(call.save_all for call in budget._calls)
        inputs = sum(call.full for call in budget._calls)
        # What is measured is what there is; states of random numbers are extra.
        assert save_all - least == pytest.approx(everything - inputs, rel=0.02)
        outside = least - inputs
        assert kept - outside <= share * everything + 4 * 6000
        found.append((kept, dict(Counter(budget._levels))))
    assert [kept for kept, _ in found] == sorted((kept for kept, _ in found), reverse=True)
    assert found[0][1].keys() == {SAVE_ALL, SELECTIVE}
    assert found[-1][1].keys() <= {FULL, SELECTIVE}
    assert found[-1][1][FULL] >= 3
    # A little over half is costly, so one block more is enough.
    assert found[2][1].get(FULL, 0) <= 1 + (dtype == torch.float32)


def test_an_amount_counts_bytes() -> None:
    module = llama()
    engine.checkpoint_activations(module, 0.5)
    step(module)
    step(module)
    first = budget_of(module)
    other = llama()
    engine.checkpoint_activations(other, f"{first.max_bytes(first._calls) / 1000:.3f}kB")
    step(other)
    step(other)
    assert budget_of(other)._levels == first._levels


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantized", [False, True])
def test_only_what_is_cheap_is_computed_again(quantized: bool, chosen: Any) -> None:
    seen = []
    for levels in ([SAVE_ALL], [SELECTIVE]):
        chosen(levels)
        module = adapted("llama", quantized)
        engine.checkpoint_activations(module, "1GB")
        loss_of(module, 0).backward()
        loss = loss_of(module, 1)
        with Operations() as operations:
            loss.backward()
        seen.append(operations.seen)
    kept, selective = seen
    costly = {
        n for n in kept | selective if "mm" in n or "attention" in n or "gemm" in n or "4bit" in n
    }
    assert "mm" in costly
    assert {name: selective[name] for name in costly} == {name: kept[name] for name in costly}
    assert selective["silu"] == kept["silu"] + 3
    assert not selective["bernoulli_"]


class Hostile(nn.Module):
    """Changes in place what others were computed from, or will be."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        before = y * 2
        both = before.exp()
        y.add_(1.0)
        after = (y * 3).sigmoid()
        gate = after * 1.0
        gate.mul_(0.5)
        view = torch.cat([both.tanh(), after], -1)[:, ::2]
        y.relu_()
        return x + self.down(view.t().contiguous().t() * gate * y.sin())


class Stack(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def stack(wanted: Any, kind: type[nn.Module] = Hostile) -> nn.Module:
    torch.manual_seed(1)
    module = Stack(kind).train()
    engine.inject(module, r=2, target_modules=["up"])
    engine.checkpoint_activations(module, wanted)
    return module


@pytest.mark.parametrize("levels", ROTATIONS)
def test_changes_in_place(levels: list[str], chosen: Any) -> None:
    chosen(levels)
    results = []
    for wanted in (False, "1GB"):
        module = stack(wanted)
        results.append([])
        for number in range(3):
            x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
            loss = module(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
            results[-1] += [loss.detach()]
        results[-1] += [p.grad for p in module.parameters() if p.grad is not None]
    assert len(results[0]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("level", [SAVE_ALL, SELECTIVE])
def test_a_change_after_the_block_is_noticed(level: str, chosen: Any) -> None:
    """As by autograd itself, which cannot look at tensors that are kept by others for it."""

    class Leaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            leaked.append(self.up(x))
            return x + leaked[-1].sin().exp()

    chosen([level])
    leaked: list[torch.Tensor] = []
    module = stack("1GB", Leaking)
    module(torch.randn(64, WIDTH)).sum().backward()
    loss = module(torch.randn(64, WIDTH)).sum()
    leaked[-1].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after it was saved"):
        loss.backward()


def test_passes_end_with_their_backward() -> None:
    module = stack(0.5)
    budget = budget_of(module)
    x = torch.randn(8, WIDTH)
    for _ in range(2):
        loss = module(x).sum()
        assert budget._alive == 2
        loss.backward()
        assert budget._alive == 0
    # Two passes before the backward of the first: the calls are those of one.
    for _ in range(2):
        losses = [module(x).sum(), module(x).sum()]
        assert budget._index == 4
        for loss in losses:
            loss.backward()
        assert budget._alive == 0
    assert len(budget._calls) == 4
    with torch.no_grad():
        module(x)
    assert budget._alive == 0
    del loss, losses
    kept = module(x).sum()
    del kept
    assert budget._alive == 0


def test_larger_batches_are_measured_and_others_are_not() -> None:
    module = llama()
    engine.checkpoint_activations(module, 0.6)
    budget = budget_of(module)

    def levels(rows: int, length: int) -> list[str]:
        before = budget._index
        step(module, rows, length)
        assert before >= 0
        return budget._levels

    assert levels(4, 48) == []
    known = levels(4, 48)
    assert known.count(SELECTIVE) >= 2
    # Of about the same size, and not larger.
    assert levels(4, 45) == known
    assert levels(4, 41) == known
    # Other sizes.
    assert levels(4, 24) == []
    assert levels(4, 24)
    assert levels(6, 48) == []
    assert levels(6, 48)
    assert levels(4, 48) == known
    assert len(budget._plans) == 3
    # Larger within what goes together: all calls are measured, once.
    assert levels(3, 41) == []
    before = budget._calls
    assert levels(3, 48) == known
    assert before is budget._calls
    assert all(call.covers(("LlamaDecoderLayer", before[0].shape[1])) for call in before)


def test_what_is_decided_is_reported() -> None:
    lines: list[str] = []
    module = llama()
    done = engine.checkpoint_activations(module, 0.5, lines.append)
    assert done.descriptions == ["4 LlamaDecoderLayer of LlamaForCausalLM"]
    for _ in range(3):
        step(module)
    (line,) = lines
    assert line.startswith("gradient_checkpointing=0.5: saved activations: ")
    assert "(3 blocks selective, 1 block full recompute)." in line
    # A smaller batch is not news.
    for _ in range(2):
        step(module, 2)
    assert len(lines) == 1
    for _ in range(2):
        step(module, 8)
    assert len(lines) == 2
    done.disable()
    assert not any("_activation_budget" in child.__dict__ for child in module.modules())


def test_too_small_a_budget(caplog: pytest.LogCaptureFixture) -> None:
    module = llama()
    engine.checkpoint_activations(module, "100kB")
    with pytest.raises(UnsupportedError, match=r"inputs of the blocks alone are .*may keep 100"):
        step(module)
    module = llama()
    engine.checkpoint_activations(module, 0.01)
    step(module)
    with pytest.raises(UnsupportedError, match=r"=0.01: the inputs of the blocks alone"):
        step(module)
    # Later it does not end a run.
    module = llama()
    engine.checkpoint_activations(module, "300kB")
    for _ in range(2):
        step(module, 1)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            step(module, 16)
    (record,) = caplog.records
    assert "This batch keeps the least that is possible" in record.getMessage()


def test_a_copy_measures_for_itself() -> None:
    module = llama()
    engine.checkpoint_activations(module, 0.5, print)
    step(module)
    other = copy.deepcopy(module)
    assert budget_of(other) is not budget_of(module)
    assert budget_of(other).limit == 0.5
    assert budget_of(other)._calls == []
    assert step(other)[1] == step(module)[1]
    assert pickle.loads(pickle.dumps(budget_of(module))).setting == 0.5


def test_the_users_own_checkpoints_are_refused() -> None:
    module = adapted("llama")
    enable_gradient_checkpointing(module)
    with pytest.raises(UnsupportedError, match=r"=0.5: .* by your own switch.*Remove one"):
        engine.checkpoint_activations(module, 0.5)


def test_levels() -> None:
    """All budgets on all small cases: it fits where anything fits, and no level is for nothing."""
    kinds = [(10, 5, 1), (6, 6, 2), (4, 3, 3), (8, 2, 5)]
    for sizes in itertools.product(kinds, repeat=3):
        calls = [BlockSizes(("Block", ()), *one) for one in sizes]
        least = sum(min(one) for one in sizes)
        for most in range(sum(call.save_all for call in calls) + 2):
            levels = choose_levels(calls, most)
            total = sum(call.of(level) for call, level in zip(calls, levels, strict=True))
            assert total <= most or (most < least and total == least)
            if most >= sum(call.save_all for call in calls):
                assert levels == [SAVE_ALL] * 3
            for index, level in enumerate(levels):
                if level == SELECTIVE and total <= most:
                    assert total - calls[index].selective + calls[index].save_all > most


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, None),
        (False, None),
        ("auto", None),
        (0.5, 0.5),
        ("2GB", 2_000_000_000),
        ("512MiB", 512 << 20),
        ("1.5 gib", 3 << 29),
        ("40kB", 40_000),
    ],
)
def test_amounts(value: Any, expected: Any) -> None:
    assert read_budget(value) == expected


@pytest.mark.parametrize("value", ["yes", "2", "0GB", "-1GB", "2GBs", 0.0, 1.0, 1.5, -0.5, 2, None])
def test_what_is_no_amount(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"it is True, False, 'auto', or how much"):
        read_budget(value)
