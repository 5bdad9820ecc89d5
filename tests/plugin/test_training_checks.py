"""What checks itself when training starts: faults stop it, healthy modules do not notice."""

from __future__ import annotations

import logging

import pytest
import torch
from modules import (
    FEATURES,
    ROOTS,
    Linears,
    differing,
    loader,
    strategy,
    task,
    task_class,
    trainer,
    weights,
)
from torch import nn

import lightning_peft
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.errors import ConfigError, DivergenceError, LifecycleError
from lightning_peft.plugin.namespace import bind_to_lightning

METHODS = ("lora", "qlora")
LOGGER = "lightning_peft.plugin.training_checks"


@pytest.fixture
def message(caplog):
    caplog.set_level(logging.INFO, LOGGER)
    return lambda: [r.getMessage() for r in caplog.records if r.name == LOGGER]


class Two(nn.Module):
    """Two stacks of linears, of which one, or none, or both are in the loss."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Linears(), Linears()


class Parts(task_class(ROOTS[0])):
    used = ("first", "second")

    def build(self):
        self.model = Two()

    def forward(self, batch):
        return sum(getattr(self.model, name)(batch[0]) for name in self.used)


def fit(module, tmp_path, method="lora", data=None, **given):
    ours = {name: given.pop(name) for name in ("verify", "adapt") if name in given}
    run = trainer(tmp_path, strategy(method, **ours), **given)
    run.fit(module, data or loader())
    return run


# --- the first step ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_part_that_the_loss_does_not_reach_stops_training(method, tmp_path):
    module = Parts()
    module.used = ("second",)
    with pytest.raises(LifecycleError, match=r"any adapter on:\n  - model\.first\nThe loss d"):
        fit(module, tmp_path, method, adapt=["model.first", "model.second"])
    assert module.trainer.global_step == 0
    quiet = Parts()
    quiet.used = ("second",)
    fit(quiet, tmp_path, method, adapt=["model.first", "model.second"], verify="off")


@pytest.mark.parametrize("method", METHODS)
def test_idle_layers_are_one_warning(method, tmp_path, message):
    class Idle(task_class(ROOTS[0])):
        def build(self):
            self.model = Linears(depth=3)
            self.model.extra = nn.ModuleList([self.model.layers.pop(2)])

    fit(Idle(), tmp_path, method, max_epochs=2)
    assert [text.partition(". ")[0] for text in message()] == [
        "In the first step no gradient reached 1 of 3 adapted layers: model.extra.0"
    ]


def test_gradients_of_zero_are_reported_and_no_fault(tmp_path, message):
    """A head that starts at zero passes nothing on in the first step."""
    module = task()
    nn.init.zeros_(module.model.head.weight)
    fit(module, tmp_path)
    assert "no gradient reached 2 of 2 adapted layers" in message()[0]
    assert all(p.any() for n, p in module.named_parameters() if "lora_B" in n)


HEALTHY = {
    "plain": ("lora", {}),
    "accumulated": ("qlora", {"accumulate_grad_batches": 3}),
    "clipped": ("lora", {"gradient_clip_val": 0.1}),
    "bf16-mixed": ("qlora", {"precision": "bf16-mixed"}),
    "several epochs": ("qlora", {"max_epochs": 2}),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_no_false_alarm_and_no_influence(case, tmp_path, message):
    method, given = HEALTHY[case]
    results = []
    for verify in ("off", "cheap", "full"):
        torch.manual_seed(2)
        module = task(kind="llama")
        run = fit(module, tmp_path, method, loader("llama"), verify=verify, **given)
        results.append((module.losses, weights(module)))
        assert results[-1][0] == results[0][0]
        assert not differing(results[-1][1], results[0][1])
        assert [x[:14] for x in message()] == (["verify='full':"] if verify == "full" else [])
        # Nothing is left that could cost anything.
        assert not any(o._optimizer_step_post_hooks for o in run.optimizers)
        assert run.strategy.lifecycle.checks._first_step is None


class Adversarial(task_class(ROOTS[0])):
    """Steps one optimizer in every batch and the other one in every third."""

    automatic_optimization = False

    def build(self):
        self.model = Two()

    def training_step(self, batch, batch_idx):
        often, seldom = self.optimizers()
        for optimizer, part in ((often, self.model.first), (seldom, self.model.second)):
            if optimizer is seldom and batch_idx % 3 != 2:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(part(batch[0]).square().mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        parts = (self.model.first, self.model.second)
        return [torch.optim.Adam(part.parameters()) for part in parts]


@pytest.mark.parametrize("method", METHODS)
def test_each_optimizer_is_judged_by_its_own_first_step(method, tmp_path, message):
    run = fit(Adversarial(), tmp_path, method, adapt=["model.first", "model.second"])
    assert message() == []
    assert not any(o._optimizer_step_post_hooks for o in run.optimizers)
    fit(Adversarial(), tmp_path, method, adapt=["model.first", "model.second"], max_steps=2)
    (text,) = message()
    assert text.startswith("Training ended before the first step with a gradient of optimizer 1 (")
    assert text.endswith("): the adapters in it are as they were.")


def test_a_dead_part_is_found_in_manual_optimization(tmp_path):
    class Detached(Adversarial):
        def manual_backward(self, loss):
            loss = loss.detach() + self.model.first.head.bias.sum()
            super().manual_backward(loss + self.model.second.head.bias.sum())

    with pytest.raises(LifecycleError, match=r"any adapter on:\n  - model\.first\n"):
        fit(Detached(), tmp_path, adapt=["model.first", "model.second"])


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_that_is_scaled_and_skipped(fused, tmp_path, message):
    """A GradScaler leaves the first steps out; the first one that is taken is judged.

    One in fused code is called, and leaves itself out.
    """
    due = []

    class Scaled(task_class(ROOTS[0])):
        automatic_optimization = False

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), fused=fused)

        def training_step(self, batch, batch_idx):
            first = self.trainer.strategy.lifecycle.checks._first_step
            due.append(first.is_due)
            assert not first.infinite
            optimizer = self.optimizers(use_pl_optimizer=False)
            scaler = self.scaler = getattr(self, "scaler", torch.amp.GradScaler("cpu"))
            optimizer.zero_grad()
            scaler.scale(self.loss(batch) * (float("inf") if batch_idx < 2 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()

    fit(Scaled(), tmp_path)
    assert message() == []
    assert due == [True] * 3 + [False] * 3


class Skipping(task_class(ROOTS[0])):
    """Skips batches the way Lightning offers."""

    skipped = (0, 1, 3)

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("method", METHODS)
def test_skipped_batches_are_waited_out(method, tmp_path, message):
    module = Skipping()
    run = fit(module, tmp_path, method)
    assert len(module.losses) == 3
    assert message() == []
    assert run.strategy.lifecycle.checks._first_step_is_due is False

    class Dead(Parts):
        """The part that nothing reaches is found at the first batch that is not skipped."""

        used = ("second",)

        def training_step(self, batch, batch_idx):
            return None if batch_idx < 2 else super().training_step(batch, batch_idx)

    dead = Dead()
    with pytest.raises(LifecycleError, match=r"any adapter on:\n  - model\.first\nThe loss d"):
        fit(dead, tmp_path, method, adapt=["model.first", "model.second"])
    assert len(dead.losses) == 1


def test_batches_that_are_all_skipped_are_one_warning(tmp_path, message):
    module = Skipping()
    module.skipped = range(6)
    fit(module, tmp_path)
    (text,) = message()
    assert text.startswith("Training ended before the first step with a gradient of optimizer 0 (")


def test_lightnings_own_error_about_closures_is_seen(tmp_path):
    class Forgetful(task_class(ROOTS[0])):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer.step()

    with pytest.raises(Exception, match="closure hasn't been executed"):
        fit(Forgetful(), tmp_path)


def test_several_fits_and_interrupted_ones(tmp_path, message):
    class Stop(Exception):
        pass

    class Failing(task_class(ROOTS[0])):
        failing = True

        def training_step(self, batch, batch_idx):
            if self.failing:
                raise Stop
            return self.loss(batch)

    module = Failing()
    run = trainer(tmp_path)
    with pytest.raises(Stop):
        run.fit(module, loader())
    assert not any(o._optimizer_step_post_hooks for o in run.optimizers)
    module.failing = False
    for _ in range(2):
        run.fit_loop.epoch_progress.reset()
        run.fit(module, loader())
    assert message() == []


# --- structure -----------------------------------------------------------------------------------


def test_adapters_that_are_off_or_spoilt_stop_training(tmp_path):
    module = task()
    fit(module, tmp_path)
    module.model.layers[0].disable_adapters = True
    module.model.layers[1].lora_A["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(LifecycleError) as caught:
        fit(module, tmp_path)
    caught.match(r"model\.layers\.0: the adapter is switched off")
    caught.match(r"model\.layers\.1\.lora_A\.default\.weight: has values that are not finite")
    # Nothing is compared at the start then; what the infinite value spoils is noticed later.
    with pytest.raises(DivergenceError, match="hold NaN or infinite values"):
        fit(module, tmp_path, verify="off", enable_checkpointing=False)


# --- the full form -------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("front", ["strategy", "callback"])
def test_full_stops_before_the_first_step(front, root, tmp_path, monkeypatch):
    sound = LoraLayer.effective_adapters
    monkeypatch.setattr(
        LoraLayer, "effective_adapters", lambda layer: sound(layer) if layer.training else []
    )
    module = task(root)
    given = {"verify": "full"}
    if front == "strategy":
        run = trainer(tmp_path, strategy("qlora", root, **given), root)
    else:
        callback = bind_to_lightning(lightning_peft.QLoRACallback, root)(
            r=4, announce=False, **given
        )
        run = trainer(tmp_path, "auto", root, callbacks=[callback])
    with pytest.raises(LifecycleError, match="called without effect in eval mode"):
        run.fit(module, loader())
    assert module.losses == []
    assert run.global_step == 0


def test_full_cannot_look_into_manual_optimization_and_says_so(tmp_path, message):
    fit(Adversarial(), tmp_path, adapt=["model.first", "model.second"], verify="full")
    (text,) = message()
    assert "not checkable this way, as training_step steps the optimizers itself" in text
    assert "ok   a checkpoint gives back everything that trains" in text


def test_full_on_a_step_that_logs_and_asks_the_trainer(tmp_path, message):
    class Talking(task_class(ROOTS[0])):
        def __init__(self):
            super().__init__()
            self.seen = 0

        def training_step(self, batch, batch_idx):
            self.seen += 1
            self.log("loss", self.loss(batch), prog_bar=True)
            self.log_dict({"rate": self.optimizers().param_groups[0]["lr"]})
            assert self.trainer.training
            return {"loss": super().training_step(batch, batch_idx) + self.trainer.global_step}

    module = Talking()
    run = fit(module, tmp_path, "qlora", verify="full")
    assert "FAIL" not in message()[0]
    assert module.seen == len(module.losses) == 6
    assert set(run.logged_metrics) == {"loss", "rate"}


def test_full_has_no_batch_where_the_step_fetches_its_own(tmp_path, message):
    class Fetching(task_class(ROOTS[0])):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return super().training_step(batch, 0)

    module = Fetching()
    fit(module, tmp_path, verify="full")
    assert len(module.losses) == 6
    assert ["there is none to verify with" in text for text in message()] == [True]


def test_modules_without_a_trainer_say_what_is_missing():
    class Asking(task_class(ROOTS[0])):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) / self.trainer.max_epochs

    module = Asking()
    lightning_peft.inject(module, r=2)
    batch = next(iter(loader()))
    text = str(lightning_peft.verify(module, batch))
    assert "as training_step uses self.trainer, and the module has none: pass step=" in text
    verification = lightning_peft.verify(module, batch, lambda module, x: module.loss(x))
    assert verification.passed
    assert "pass step=" not in str(verification)

    class Silent(task_class(ROOTS[0])):
        def training_step(self, batch, batch_idx):
            return None

    module = Silent()
    lightning_peft.inject(module, r=2)
    verification = lightning_peft.verify(module, batch)
    assert "as training_step returned None: pass step=" in str(verification)
    assert verification.passed


def test_an_error_of_the_step_is_the_users_own(tmp_path):
    module = task()
    lightning_peft.inject(module, r=2)
    with pytest.raises(RuntimeError, match="shape"):
        lightning_peft.verify(module, [torch.randn(4, FEATURES + 1), torch.zeros(4).long()])


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="verify='deep': choose one of cheap, full, off"):
        strategy(verify="deep")
