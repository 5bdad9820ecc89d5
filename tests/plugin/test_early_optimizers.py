"""Optimizers that are older than the adapters, or touch parameters without gradients."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from modules import (
    ROOTS,
    differing,
    loader,
    resumed,
    steps_class,
    strategy,
    task_class,
    trainer,
    weights,
)
from test_lightning_cli import TRAINER, make_cli
from torch import nn

from lightning_peft import engine
from lightning_peft.errors import LifecycleError

METHODS = ("lora", "qlora")
KINDS = {
    "lora": {},
    "qlora": {"optimizer": None},
    "8bit": {"load_in_8bit": True, "optimizer": None},
}


def ours(kind):
    return strategy("lora" if kind == "lora" else "qlora", **KINDS[kind])


def names_in(module, group) -> list[str]:
    ids = {id(param) for param in group["params"]}
    return [name for name, param in module.named_parameters() if id(param) in ids]


def moved(module) -> list[str]:
    """Returns the names of the second factors that training changed."""
    return [n for n, p in module.named_parameters() if "lora_B" in n and p.any()]


BOTH = [f"model.layers.{i}.lora_B.default.weight" for i in (0, 1)]


class InConstructor(task_class(ROOTS[0])):
    """Makes its optimizer where there are no adapters yet."""

    def make(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def __init__(self, kind="linears"):
        super().__init__(kind)
        self.opt = self.make()
        self.dense = [weakref.ref(p) for p in self.model.layers.parameters() if p.ndim > 1]

    def configure_optimizers(self):
        return self.opt

    def on_train_start(self):
        gc.collect()
        self.alive = [reference() is not None for reference in self.dense]


class Late(InConstructor):
    def configure_optimizers(self):
        return self.make()


# --- LightningCLI ------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "root"), [("lora", ROOTS[1]), ("qlora", ROOTS[0])])
def test_the_optimizer_of_lightning_cli(method, root):
    flags = [f"--trainer.{key}={str(value).lower()}" for key, value in TRAINER.items()]
    schedule = ["--lr_scheduler=torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size=1"]
    wanted = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.05", *schedule]
    torch.manual_seed(3)
    cli = make_cli(root, [*flags, f"--trainer.strategy={method}", *wanted])
    cli.trainer.fit(cli.model, cli.datamodule)
    (optimizer,) = cli.trainer.optimizers
    schedule = cli.trainer.lr_scheduler_configs[0].scheduler
    assert schedule.optimizer is optimizer
    assert schedule.get_last_lr() == [pytest.approx(0.005)]
    assert moved(cli.model) == BOTH
    assert type(optimizer).__name__ == "AdamW"
    assert optimizer.param_groups[0]["fused"] == (True if method == "qlora" else None)


# --- made in the constructor -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "qlora", pytest.param("8bit", marks=pytest.mark.long)])
def test_an_early_optimizer_trains_as_one_made_in_time(kind, tmp_path):
    results = []
    for cls in (InConstructor, Late):
        torch.manual_seed(5)
        module = cls()
        run = trainer(tmp_path, ours(kind), max_epochs=2)
        run.fit(module, loader())
        results.append((module.losses, weights(module)))
        assert run.optimizers == ([module.opt] if cls is InConstructor else run.optimizers)
        if cls is InConstructor:
            # Nothing keeps the dense weights where there are codes now.
            assert module.alive == [kind == "lora"] * 2
    assert results[0][0] == results[1][0]
    assert not differing(results[0][1], results[1][1])


@pytest.mark.parametrize("method", ["qlora", pytest.param("lora", marks=pytest.mark.long)])
def test_an_early_optimizer_resumes(method, tmp_path):
    def fit(ckpt_path=None, callbacks=()):
        module = InConstructor()
        run = trainer(tmp_path, method, max_epochs=2, callbacks=list(callbacks))
        run.fit(module, loader(), ckpt_path=ckpt_path)
        return module

    resumed(fit, tmp_path, 4, steps=(4,))


class Groups(InConstructor):
    """Groups by pattern: a rate for each layer, none for biases and norms, and names kept."""

    def make(self):
        groups = [
            {"params": list(layer.named_parameters()), "lr": 0.1 / (index + 1)}
            for index, layer in enumerate(self.model.layers)
        ]
        rest = [*self.model.norm.named_parameters(), *self.model.head.named_parameters()]
        return torch.optim.SGD([*groups, {"params": rest, "lr": 0.0}], lr=0.1)


@pytest.mark.parametrize("kind", ["qlora", pytest.param("lora", marks=pytest.mark.long)])
def test_adapters_go_into_the_group_of_their_layer(kind, tmp_path):
    module = Groups()
    groups = list(module.opt.param_groups)
    trainer(tmp_path, ours(kind)).fit(module, loader())
    assert [a is b for a, b in zip(module.opt.param_groups, groups, strict=True)] == [True] * 3
    for index, group in enumerate(groups[:2]):
        layer = f"model.layers.{index}"
        factors = [f"{layer}.lora_{side}.default.weight" for side in "AB"]
        assert names_in(module, group) == [f"{layer}.bias", *factors]
        assert group["param_names"] == [*factors, "bias"]
        assert len(group["params"]) == 3
    assert [group["lr"] for group in groups] == [0.1, 0.05, 0.0]


class Manual(InConstructor):
    """Two optimizers of its own; returned, or only kept and stepped."""

    automatic_optimization = False
    returned = True

    def make(self):
        tail = [*self.model.layers[1].parameters(), *self.model.head.parameters()]
        first = torch.optim.Adam(self.model.layers[0].parameters(), lr=0.05)
        return {"first": first, "second": torch.optim.SGD(tail, lr=0.1)}

    def configure_optimizers(self):
        return list(self.opt.values()) if self.returned else None

    def training_step(self, batch, batch_idx):
        for optimizer in self.opt.values():
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()


@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_several_optimizers_in_manual_optimization(method, returned, tmp_path):
    module = Manual()
    module.returned = returned
    trainer(tmp_path, method).fit(module, loader())
    assert moved(module) == BOTH
    for index, optimizer in enumerate(module.opt.values()):
        held = [n for group in optimizer.param_groups for n in names_in(module, group)]
        assert {f"model.layers.{index}.lora_{side}.default.weight" for side in "AB"} <= {*held}
        assert not any("lora" in n and f"layers.{1 - index}." in n for n in held)


def test_lists_that_are_older_are_logged(tmp_path, said):
    class Early(InConstructor):
        def make(self):
            return list(self.parameters())

        def configure_optimizers(self):
            return torch.optim.SGD(self.opt, lr=0.1)

    module = Early()
    trainer(tmp_path, "qlora").fit(module, loader())
    assert moved(module) == BOTH
    wanted = "optimizer 0 (SGD) held 2 frozen weights; the adapters on them train in their place."
    assert wanted in said


# --- what constructors of optimizers do --------------------------------------------------------


class Momenta(torch.optim.Optimizer):
    """Makes its states when it is made; they are needed later."""

    def __init__(self, params, lr=0.1, fail=False):
        super().__init__(params, {"lr": lr, "fail": fail})
        for group in self.param_groups:
            for param in group["params"]:
                if group["fail"] and param.numel() < 200:
                    raise ValueError("too small")
                self.state[param]["sum"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                # What several optimizers do before they look for a gradient.
                param.mul_(1 - 0.1 * group["lr"])
                if param.grad is not None:
                    self.state[param]["sum"] += param.grad
                    param -= group["lr"] * self.state[param]["sum"]
        return loss


class Flat(torch.optim.LBFGS):
    """A subclass of the optimizer with one long vector."""


MAKERS = {
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.1),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
    "subclass of LBFGS": lambda params: Flat(params, lr=0.1, max_iter=2),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
    "foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "own": Momenta,
}


USUAL = {("Adagrad", "qlora", True), ("LBFGS", "8bit", False), ("LBFGS", "qlora", True)}
USUAL |= {("own", "lora", False), ("own", "qlora", True), ("own", "qlora", False)}


@pytest.mark.parametrize(
    ("name", "kind", "early"),
    [
        pytest.param(*case, marks=[] if case in USUAL else pytest.mark.long)
        for case in itertools.product(MAKERS, KINDS, (True, False))
    ],
)
def test_optimizers_of_every_kind(name, kind, early, tmp_path):
    class Made(InConstructor if early else Late):
        def make(self):
            return MAKERS[name](self.parameters() if early else list(self.parameters()))

        def on_fit_start(self):
            frozen = engine.require_record(self).frozen
            self.base = {n: p.clone() for n, p in self.named_parameters() if n in frozen}

    module = Made()
    trainer(tmp_path, ours(kind)).fit(module, loader())
    assert moved(module) == BOTH
    now = {n: p for n, p in module.named_parameters() if n in module.base}
    assert not differing(now, module.base)


def test_flat_vectors_are_as_long_as_what_trains(tmp_path):
    module = Late()
    module.make = lambda: torch.optim.LBFGS(module.parameters(), max_iter=2)
    run = trainer(tmp_path, "qlora")
    run.fit(module, loader())
    (state,) = run.optimizers[0].state.values()
    assert state["d"].numel() == sum(p.numel() for p in module.parameters() if p.requires_grad)


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer, and keeps slow weights in lists of its own."""

    def __init__(self, params):
        self.inner = torch.optim.SGD(params, lr=0.1)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups
        self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    def step(self, closure=None):
        loss = self.inner.step(closure)
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for param, kept in zip(group["params"], slow, strict=True):
                param.data.copy_(kept.lerp_(param.data, 0.5))
        return loss


class Apart(torch.optim.Optimizer):
    """Steps another optimizer, which has lists of its own."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params, {"lr": 0.1})
        self.inner = torch.optim.SGD(params, lr=0.1)

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("cls", [Lookahead, Apart])
def test_optimizers_with_lists_of_their_own(cls, tmp_path):
    class Made(Late):
        def make(self):
            return cls(p for p in self.parameters() if self.all or p.requires_grad)

        all = True

    message = f"{cls.__name__} holds weights of the frozen base, and they cannot leave it"
    for early, method in ((True, "lora"), (True, "qlora"), (False, "qlora")):
        module = (
            type("Early", (Made,), {"configure_optimizers": lambda m: m.opt}) if early else Made
        )()
        with pytest.raises(LifecycleError, match=message):
            trainer(tmp_path, method).fit(module, loader())
        assert module.losses == []
    for everything, method in ((True, "lora"), (False, "lora"), (False, "qlora")):
        module = Made()
        module.all = everything
        trainer(tmp_path, method).fit(module, loader())
        assert moved(module) == BOTH


def test_states_that_cannot_be_made_again_are_refused(tmp_path):
    class Refusing(InConstructor):
        def make(self):
            weights = [layer.weight for layer in self.model.layers]
            return Momenta(weights, fail=True)

    message = r"Momenta made states for the base weights .* \(too small\)\. Make it inside conf"
    module = Refusing()
    with pytest.raises(LifecycleError, match=message):
        trainer(tmp_path, "lora").fit(module, loader())
    assert module.losses == []


@pytest.mark.parametrize("method", METHODS)
def test_biases_alone_do_not_stand_for_adapters(method, tmp_path):
    class Biases(InConstructor):
        def make(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if "bias" in n], lr=0.1)

    with pytest.raises(LifecycleError, match="4 of 4 trainable tensors of Biases are in no opt"):
        trainer(tmp_path, method).fit(Biases(), loader())


def test_weights_of_one_tensor_have_one_place(tmp_path):
    """A tied weight stands for the adapters of both layers."""

    class Tied(steps_class(ROOTS[0])):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
            self.second.weight, self.head = self.first.weight, nn.Linear(32, 3)
            self.opt = torch.optim.AdamW(self.parameters(), lr=0.01)

        def forward(self, batch):
            return self.head(self.second(self.first(batch[0]).relu()).relu())

        def configure_optimizers(self):
            return self.opt

    module = Tied()
    trainer(tmp_path, "lora").fit(module, loader())
    trained = ["first.lora_B.default.weight", "second.lora_B.default.weight"]
    assert moved(module) == trained
