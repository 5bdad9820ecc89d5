"""Optimizers see the adapters, or training does not start; Lightning's ways of stepping work."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from modules import ROOTS, differing, loader, strategy, task, task_class, trainer, weights
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import LifecycleError
from lightning_peft.plugin.adapter_checks import check_optimizers
from lightning_peft.plugin.optimization import float32_advice

METHODS = ("lora", "qlora")


class ByName(task_class(ROOTS[0])):
    def configure_optimizers(self):
        named = [p for n, p in self.named_parameters() if n.endswith("layers.0.weight")]
        return torch.optim.SGD(named, lr=0.1)


class Half(task_class(ROOTS[0])):
    def configure_optimizers(self):
        return torch.optim.SGD(self.model.layers[0].parameters(), lr=0.1)


class Chosen(task_class(ROOTS[0])):
    def configure_optimizers(self):
        mine = [p for n, p in self.named_parameters() if "layers.0.lora_" in n]
        return torch.optim.SGD(mine, lr=0.1)


class Without(task_class(ROOTS[0])):
    def configure_optimizers(self):
        return None


class Second(task_class(ROOTS[0])):
    def configure_optimizers(self):
        frozen = [p for n, p in self.named_parameters() if n.endswith("layers.0.weight")]
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(frozen, lr=0.1)]

    automatic_optimization = False


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("cls", "messages"),
    [
        (Chosen, [r"2 of 4 trainable tensors of Chosen .*'model\.layers\.1\.lora_A\.default"]),
        (Second, [r"optimizer 1 \(SGD\) holds only frozen"]),
    ],
)
def test_optimizers_without_the_adapters_are_refused(cls, messages, method, tmp_path):
    with pytest.raises(LifecycleError) as caught:
        trainer(tmp_path, method).fit(cls(), loader())
    for message in [*messages, "inside\nconfigure_optimizers|inside configure_optimizers"]:
        caught.match(message)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", [ByName, Half])
def test_optimizers_of_some_layers_train_their_adapters(cls, method, tmp_path):
    """By the weight of the layer alone, or by all that is in it."""
    module = cls()
    trainer(tmp_path, method).fit(module, loader())
    trained = [n for n, p in module.named_parameters() if "lora_B" in n and p.any()]
    assert trained == ["model.layers.0.lora_B.default.weight"]


@pytest.mark.parametrize(
    ("method", "verify"), [("lora", "off"), ("lora", "full"), ("qlora", "cheap")]
)
def test_without_an_optimizer_nothing_trains_as_in_lightning(method, verify, tmp_path):
    """Lightning warns and runs on with a stand-in."""
    module = Without()
    run = trainer(tmp_path, strategy(method, verify=verify))
    run.fit(module, loader())
    assert run.global_step == len(module.losses) == 6
    assert not any(p.any() for n, p in module.named_parameters() if "lora_B" in n)
    file = tmp_path / "last.ckpt"
    run.save_checkpoint(file)
    resumed = trainer(tmp_path, strategy(method, verify=verify), max_epochs=2)
    resumed.fit(Without(), loader(), ckpt_path=file)
    assert resumed.global_step == 12


class Sparse:
    """What Lightning takes for an optimizer: groups and states, of no class of torch."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params), "lr": 0.1}]
        self.defaults, self.state = {}, {}

    def state_dict(self):
        return {"state": {}, "param_groups": []}

    def load_state_dict(self, state):
        pass

    def zero_grad(self, set_to_none=True):
        for param in self.param_groups[0]["params"]:
            param.grad = None

    def step(self, closure=None):
        loss = closure()
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                param.data -= 0.1 * param.grad
        return loss


@pytest.mark.parametrize(("method", "verify"), [("lora", "off"), ("qlora", "cheap")])
def test_optimizers_of_no_class_of_torch(method, verify, tmp_path):
    class Odd(task_class(ROOTS[0])):
        def configure_optimizers(self):
            return Sparse(self.parameters())

    module = Odd()
    trainer(tmp_path, strategy(method, verify=verify)).fit(module, loader())
    assert all(p.any() for n, p in module.named_parameters() if "lora_B" in n)


def test_unchecked_optimizers_are_the_users_own_choice(tmp_path):
    module = Half()
    trainer(tmp_path, strategy("lora", verify="off")).fit(module, loader())
    idle = [n for n, p in module.named_parameters() if "lora_B" in n and not p.any()]
    assert idle == ["model.layers.1.lora_B.default.weight"]


UNFROZEN = r"unfrozen(.|\n)*layers\.1\.weight(.|\n)*modules_to_"


@pytest.mark.parametrize(
    ("hook", "method", "message"),
    [
        ("configure_optimizers", "lora", UNFROZEN),
        ("on_train_epoch_start", "lora", UNFROZEN),
        ("on_train_epoch_start", "qlora", r"unfreezes weights .* quantized.*'model\.layers\.0'"),
        ("replace", "lora", r"thrown away(.|\n)*layers\.1: has no adapter any more.*configure_mod"),
    ],
)
def test_a_base_that_changes_is_not_lost_in_silence(hook, method, message, tmp_path):
    class Changing(task_class(ROOTS[0])):
        def configure_optimizers(self):
            if hook == "configure_optimizers":
                self.unfreeze()
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                if hook == "replace":
                    self.model.layers[1] = nn.Linear(32, 32).requires_grad_(False)
                self.model.layers[1].weight.requires_grad_(hook != "replace")

    with pytest.raises(LifecycleError, match=message):
        trainer(tmp_path, method, max_epochs=2).fit(Changing(), loader())


def test_tensors_that_the_module_does_not_hold_are_announced(caplog):
    module = task()
    lightning_peft.inject(module, r=4)
    outside = nn.Linear(2, 2)
    check_optimizers(module, [torch.optim.SGD([*module.parameters(), *outside.parameters()])])
    assert "trains 2 tensors that are not parameters of the module" in caplog.text


@pytest.mark.parametrize(("method", "optimizer"), [("lora", None), ("qlora", "adamw_8bit")])
def test_manual_optimization_with_two_optimizers(method, optimizer, tmp_path):
    class Adversarial(task_class(ROOTS[0])):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.critic = nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            with first.toggle_model():
                value = self.loss(batch) - self.critic(self(batch)).mean()
                self.losses.append(value.item())
                first.zero_grad()
                self.manual_backward(value)
                first.step()
            self.toggle_optimizer(second)
            second.zero_grad()
            self.manual_backward(self.critic(self(batch).detach()).square().mean())
            second.step()
            self.untoggle_optimizer(second)
            for schedule in self.lr_schedulers():
                schedule.step()

        def configure_optimizers(self):
            made = [torch.optim.Adam(m.parameters(), lr=0.02) for m in (self.model, self.critic)]
            return made, [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in made]

    module = Adversarial()
    before = weights(module)
    ours = {"adapt": "model", "optimizer": optimizer}
    run = trainer(tmp_path, strategy(method, **ours))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert {type(o) for o in run.optimizers} == {
        bnb.optim.AdamW8bit if optimizer else torch.optim.Adam
    }
    for made in run.optimizers:
        assert made.param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**6)
        assert all(state["step"] == 6 for state in made.state.values())
    assert not torch.equal(before["critic.weight"], module.critic.weight)
    assert all(p.any() for n, p in module.named_parameters() if "lora_B" in n)
    # What toggling left as `requires_grad` does not decide what is saved.
    fresh = Adversarial()
    other = trainer(tmp_path, strategy(method, **ours), max_epochs=2)
    other.fit(fresh, loader(), ckpt_path=tmp_path / "one.ckpt")
    assert len(fresh.losses) == 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "given",
    [{}, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}],
    ids=["plain", "accumulated and clipped"],
)
def test_steps_are_those_of_plain_lightning(method, given, tmp_path):
    """The same adapters, injected by hand and trained with Lightning's own strategy."""
    ours = {"optimizer": None}
    config = strategy(method).lifecycle.injection
    results = []
    for by_hand in (True, False):
        module = task(kind="llama")
        torch.manual_seed(11)
        if by_hand:
            engine.inject(
                module, config.peft_config, quantization_config=config.quantization_config
            )
        run = trainer(tmp_path, "auto" if by_hand else strategy(method, **ours), **given)
        run.fit(module, loader("llama", shuffle=True))
        results.append((module.losses, weights(module)))
    assert results[0][0] == results[1][0]
    assert not differing(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("dtype", "settings", "slow"),
    [
        (torch.float32, {}, True),
        (torch.bfloat16, {}, False),
        (torch.float32, {"bnb_4bit_compute_dtype": "float32"}, False),
        (torch.float32, {"bnb_4bit_compute_dtype": "bfloat16"}, False),
    ],
)
def test_products_in_float32_are_named_on_a_gpu(dtype, settings, slow):
    config = engine.quantization_config(**settings)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    engine.inject(net, quantization_config=config, target_modules=["0", "1"])
    advice = float32_advice(net, torch.device("cuda"), "32-true")
    assert (advice is not None) == slow
    if slow:
        assert "2 quantized layers" in advice
        assert "Trainer(precision='bf16-mixed')" in advice
    assert float32_advice(net, torch.device("cuda"), "bf16-mixed") is None
    assert float32_advice(net, torch.device("cpu"), "32-true") is None
