"""bitsandbytes' optimizers stand in for torch's, in place; paged states are paged again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_peft import engine
from lightning_peft.engine.training.optimizers import OPTIMIZERS
from lightning_peft.errors import CheckpointError, ConfigError

STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def layers() -> nn.Sequential:
    """Two layers, the first with a weight that 8-bit optimizers quantize the states of."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 2))


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": model[0].parameters(), "lr": 0.02, "weight_decay": 0.1, "name": "first"},
        {"params": model[2].parameters(), "lr": 0.003, "weight_decay": 0.0, "name": "second"},
    ]


def train(
    model: nn.Module, optimizer: Any, scheduler: Any = None, steps: int = STEPS
) -> list[list[float]]:
    """Takes some steps on fixed data; returns the learning rates of each."""
    draw = torch.Generator().manual_seed(5)
    x, y = torch.randn(32, 64, generator=draw), torch.randn(32, 2, generator=draw)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
    return rates


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_is_bitsandbytes_own(name: str) -> None:
    """In place or made by its constructor: the same steps, bit for bit."""
    made, replaced = layers(), layers()
    three = {"betas": (0.8, 0.99, 0.9999)} if "ademamix" in name else {"betas": (0.8, 0.99)}
    direct = OPTIMIZERS[name](groups(made), **three)
    optimizer = torch.optim.AdamW(groups(replaced), betas=(0.8, 0.99))
    report = engine.replace_optimizers([optimizer], name)
    assert report[0].startswith(f"AdamW is now bitsandbytes' {type(direct).__name__}")
    assert type(optimizer) is type(direct)
    train(made, direct)
    train(replaced, optimizer)
    for a, b in zip(made.parameters(), replaced.parameters(), strict=True):
        assert torch.equal(a, b)
    states = optimizer.state[replaced[0].weight]
    assert states["state1"].dtype == (torch.uint8 if "8bit" in name else torch.float32)
    assert optimizer.state[replaced[0].bias]["state1"].dtype == torch.float32


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 1 / (n + 1), lambda n: 0.9**n]),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 3)], [3]
    ),
    # Changes the betas as well.
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.02, 0.003], total_steps=STEPS + 1),
}


@pytest.mark.parametrize("name", ["auto", "adamw_32bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_32_bit_is_torchs_adamw_under_the_users_schedule(schedule: str, name: str) -> None:
    results = []
    for replace in (False, True):
        model = layers()
        optimizer = torch.optim.AdamW(groups(model), eps=1e-7)
        scheduler = SCHEDULES[schedule](optimizer)
        group = optimizer.param_groups[0]
        if replace:
            engine.replace_optimizers([optimizer], name)
            theirs = isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit)
            assert theirs == (name != "auto")
            assert scheduler.optimizer is optimizer
            assert optimizer.param_groups[0] is group
            assert (group["name"], group["eps"]) == ("first", 1e-7)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*optimizer.step")
            rates = train(model, optimizer, scheduler)
        results.append((rates, list(model.parameters())))
    assert results[0][0] == results[1][0]
    assert len({tuple(rates) for rates in results[1][0]}) > 2
    start = list(layers().parameters())
    for torchs, ours, before in zip(results[0][1], results[1][1], start, strict=True):
        assert (torchs - before).abs().max() > 1e-3
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-6)


def test_hooks_references_and_state_dicts_go_on() -> None:
    model, seen = layers(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    optimizer.label = "mine"
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    assert optimizer._step_supports_amp_scaling
    engine.replace_optimizers([optimizer], "adamw_8bit")
    # A GradScaler would leave it to a fused optimizer to unscale the gradients.
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    assert optimizer.label == "mine"
    train(model, optimizer, steps=2)
    assert seen == ["before", "after"] * 2
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, steps=2)
    other = layers()
    again = torch.optim.AdamW(other.parameters(), lr=0.01)
    engine.replace_optimizers([again], "adamw_8bit")
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(other, again, steps=2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_parameters_leave_and_empty_groups_stay() -> None:
    model = layers()
    optimizer = torch.optim.AdamW(groups(model))
    frozen = {id(p) for p in model[0].parameters()} | {id(model[2].bias)}
    engine.replace_optimizers([optimizer], "auto", frozen)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]
    assert optimizer.param_groups[1]["params"][0] is model[2].weight


def replaced_step(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters())
    own = optimizer.step
    optimizer.step = lambda *given: own(*given)
    return optimizer


def stepped(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=1)
    return optimizer


def with_load_hook(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_load_state_dict_post_hook(lambda _: None)
    return optimizer


IMPOSSIBLE: dict[str, tuple[Callable[[nn.Module], Any], list[str]]] = {
    "settings": (
        lambda m: torch.optim.AdamW(m.parameters(), torch.tensor(0.1), amsgrad=True, maximize=True),
        ["amsgrad=True", "maximize=True", "lr is a tensor"],
    ),
    "differentiable": (
        lambda m: torch.optim.Adam(m.parameters(), differentiable=True),
        ["differentiable=True"],
    ),
    "state": (stepped, ["has a state already"]),
    "step": (replaced_step, ["its step method was replaced"]),
    "hook": (with_load_hook, ["hooks of load_state_dict"]),
    "float64": (lambda m: torch.optim.AdamW(m.double().parameters()), ["float64 parameters"]),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_bitsandbytes_cannot_do_is_kept_or_refused(case: str) -> None:
    make, messages = IMPOSSIBLE[case]
    optimizer = make(layers())
    before = (type(optimizer), dict(optimizer.__dict__))
    fine = torch.optim.AdamW(layers().parameters())
    with pytest.raises(ConfigError, match="'adamw_8bit' cannot take the place") as caught:
        engine.replace_optimizers([fine, optimizer], "adamw_8bit")
    for message in [*messages, "optimizer=None"]:
        caught.match(message)
    assert type(fine) is torch.optim.AdamW
    assert (type(optimizer), optimizer.__dict__) == before


def test_auto_takes_torchs_fused_step_of_float32_weights() -> None:
    """The same object and settings; bitsandbytes' only for moments of 16-bit weights."""

    def one(cls: Any, model: Any = None, **given: Any) -> Any:
        return cls((model or layers()).parameters(), lr=0.01, **given)

    adam, adamw = one(torch.optim.Adam, weight_decay=0.1, amsgrad=True), one(torch.optim.AdamW)
    halves = one(torch.optim.AdamW, layers().bfloat16())
    optimizers = [adam, adamw, halves]
    report = engine.replace_optimizers(optimizers, "auto")
    assert [type(o) for o in optimizers] == [
        torch.optim.Adam, torch.optim.AdamW, bnb.optim.AdamW32bit
    ]  # fmt: skip
    assert report == [
        "Adam takes torch's fused step",
        "AdamW takes torch's fused step",
        "AdamW is now bitsandbytes' AdamW32bit",
    ]
    for optimizer in (adam, adamw):
        assert all(group["fused"] for group in optimizer.param_groups)
        # Lightning clips no gradients of an optimizer that has it.
        assert not hasattr(optimizer, "_step_supports_amp_scaling")
    assert adam.param_groups[0]["weight_decay"] == 0.1
    results = []
    for optimizer in (one(torch.optim.Adam, model := layers(), weight_decay=0.1), None):
        if optimizer is None:
            optimizer = one(torch.optim.Adam, model := layers(), weight_decay=0.1)
            engine.replace_optimizers([optimizer], "auto")
        train(model, optimizer)
        results.append(model[0].weight)
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    assert (results[0] - layers()[0].weight).abs().max() > 1e-3


class Mine(torch.optim.AdamW):
    """The user's own, which may step in another way."""


KEPT: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "class": (lambda m: torch.optim.SGD(m.parameters()), "it is not torch's own Adam or AdamW"),
    "subclass": (lambda m: Mine(m.parameters()), "it is not torch's own Adam or AdamW"),
    "foreach": (lambda m: torch.optim.AdamW(m.parameters(), foreach=True), "foreach=True is yours"),
    "unfused": (lambda m: torch.optim.AdamW(m.parameters(), fused=False), "fused=False is yours"),
    "differentiable": (IMPOSSIBLE["differentiable"][0], "differentiable=True is yours"),
    "state": (stepped, "it has a state already"),
    "meta": (lambda m: torch.optim.AdamW(m.to("meta").parameters()), "no fused step on meta"),
    "L2 of 16 bits": (
        lambda m: torch.optim.Adam(m.half().parameters(), weight_decay=0.1), "added to the gradient"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_auto_keeps_what_chooses_for_itself(case: str) -> None:
    make, reason = KEPT[case]
    optimizer = make(layers())
    before = copy.deepcopy([type(optimizer), optimizer.defaults, optimizer.param_groups])
    (report,) = engine.replace_optimizers([optimizer], "auto")
    assert report.startswith(f"{type(optimizer).__name__} is kept: ")
    assert reason in report
    assert str([type(optimizer), optimizer.defaults, optimizer.param_groups]) == str(before)


def test_bitsandbytes_decouples_weight_decay_in_adam_too() -> None:
    """Why torch's Adam with weight decay is kept."""
    results = []
    for cls in (bnb.optim.Adam32bit, torch.optim.AdamW, torch.optim.Adam):
        model = layers()
        train(model, cls(model.parameters(), lr=0.01, weight_decay=0.3))
        results.append(model[0].weight)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    assert (results[0] - results[2]).abs().max() > 1e-3


def test_by_name_says_what_changes() -> None:
    sgd = torch.optim.SGD(layers().parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    (report,) = engine.replace_optimizers([sgd], "ademamix_8bit")
    for words in ("momentum=0.9 has no meaning", "decoupled now", "betas", "'alpha': 5.0"):
        assert words in report
    assert sgd.param_groups[0]["weight_decay"] == 0.1
    assert sgd.param_groups[0]["betas"] == (0.9, 0.999, 0.9999)
    assert "momentum" not in sgd.param_groups[0]


def test_paged_ademamix_on_the_cpu_is_refused_where_it_would_fail() -> None:
    optimizer = torch.optim.AdamW(nn.Linear(400, 400).parameters())
    with pytest.raises(ConfigError, match=r"cannot page AdEMAMix on the CPU .* 100,000"):
        engine.replace_optimizers([optimizer], "paged_ademamix_32bit")


def test_names_are_checked_and_the_nearest_is_named() -> None:
    for name in (None, "auto", *OPTIMIZERS):
        engine.check_optimizer_name(name)
    with pytest.raises(ConfigError, match=r"'pagd_adamw8bit' .*near names: paged_adamw_8bit"):
        engine.check_optimizer_name("pagd_adamw8bit")


def test_the_names_are_those_of_transformers() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    theirs = {name.value for name in training_args.OptimizerNames}
    ours = {"adamw_32bit", "ademamix_32bit"}
    assert OPTIMIZERS.keys() - theirs == ours


def test_states_of_another_optimizer_are_refused() -> None:
    optimizer = torch.optim.AdamW(layers().parameters())
    module = nn.Module()
    saved = engine.describe_optimizers(module, [optimizer])
    engine.check_same_optimizers(saved, module, [optimizer])
    engine.check_same_optimizers({}, module, [optimizer])
    engine.replace_optimizers([optimizer], "adamw_8bit")
    with pytest.raises(CheckpointError, match="states of AdamW, and this run has AdamW8bit"):
        engine.check_same_optimizers(saved, module, [optimizer])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda a, b: [{"params": [b, a]}], "for weight in group 0, and this run bias in group 0"),
        (lambda a, b: [{"params": [a]}], "for bias in group 0, and this run nothing"),
        (lambda a, b: [{"params": [a]}, {"params": [b]}], "this run bias in group 1"),
        (lambda a, b: [{"params": [a, b]}, {"params": []}], "for 1 groups, and this run 2"),
    ],
)
def test_states_are_not_given_to_other_parameters(groups, message) -> None:
    """torch goes by position; its fused step writes past the end of a state that is too small."""
    module = nn.Linear(4, 4)
    saved = engine.describe_optimizers(module, [torch.optim.Adam(module.parameters())])
    other = torch.optim.Adam(groups(module.weight, module.bias))
    with pytest.raises(CheckpointError, match=message):
        engine.check_same_optimizers(saved, module, [other])


def test_other_optimizers_are_left_alone() -> None:
    layer = nn.Linear(400, 400)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 400)).sum().backward()
    optimizer.step()
    before = {id(v) for state in optimizer.state.values() for v in state.values()}
    assert engine.restore_paging(optimizer) == 0
    assert {id(v) for state in optimizer.state.values() for v in state.values()} == before


def test_states_on_the_cpu_are_left_alone() -> None:
    layer = nn.Linear(400, 400)
    optimizer = bnb.optim.PagedAdamW32bit(layer.parameters())
    assert optimizer.is_paged
    optimizer.state[layer.weight]["state1"] = torch.zeros(400, 400)
    assert engine.restore_paging(optimizer) == 0


@pytest.mark.gpu
def test_a_resumed_paged_optimizer_is_paged_again() -> None:
    layer = nn.Linear(400, 400, device="cuda")

    def steps(optimizer: bnb.optim.PagedAdamW32bit, count: int) -> None:
        for _ in range(count):
            layer(torch.ones(2, 400, device="cuda")).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    first = bnb.optim.PagedAdamW32bit(layer.parameters())
    steps(first, 2)
    saved = copy.deepcopy(first.state_dict())
    second = bnb.optim.PagedAdamW32bit(layer.parameters())
    second.load_state_dict(saved)
    assert engine.restore_paging(second) == 2
    state = second.state[layer.weight]
    assert all(getattr(state[name], "is_paged", False) for name in ("state1", "state2"))
    for name in ("state1", "state2"):
        assert torch.equal(state[name].cpu(), first.state[layer.weight][name].cpu())
    steps(second, 1)
