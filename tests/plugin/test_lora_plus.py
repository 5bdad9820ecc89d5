"""LoRA+: two learning rates in one group, for the time of a step; LoRA-FA: A is frozen."""

from __future__ import annotations

import pytest
import torch
from modules import ROOTS, build, differing, loader, resumed, strategy, task, task_class, weights
from modules import trainer as make_trainer
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import ConfigError

TARGETS = ["layers.0", "layers.1"]


def test_ten_steps_are_those_of_peft(tmp_path):
    class Task(task_class(ROOTS[0])):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.0)

    torch.manual_seed(5)
    module = Task()
    module.model.norm, module.model.head = nn.Identity(), nn.Linear(32, 3).requires_grad_(False)
    start = {n: v.clone() for n, v in module.model.state_dict().items()}
    ours = strategy(target_modules=TARGETS, lora_alpha=8, lora_plus_lr_ratio=16.0)
    make_trainer(tmp_path, ours, max_epochs=2, max_steps=10).fit(module, loader())

    torch.manual_seed(5)
    base = Task().model
    base.norm, base.head = nn.Identity(), nn.Linear(32, 3)
    base.load_state_dict(start)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    theirs = get_peft_model(base, config)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0
    )
    for x, y in [*loader(), *loader()][:10]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    expected = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters()}
    mine = {n: p for n, p in module.model.named_parameters() if ".lora_" in n}
    assert len(mine) == 4
    for name, value in mine.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "optimizer", [None, *(pytest.param(x, marks=pytest.mark.long) for x in ("auto", "adamw_8bit"))]
)
def test_groups_and_schedulers_stay_the_users_and_resume(optimizer, tmp_path):
    def fit(ckpt_path=None, callbacks=(), ratio=8.0):
        torch.manual_seed(5 if ckpt_path is None else 1000)
        module = task()
        ours = strategy(optimizer=optimizer, lora_plus_lr_ratio=ratio)
        run = make_trainer(tmp_path / "root", ours, max_epochs=2, callbacks=list(callbacks))
        run.fit(module, loader(shuffle=True), ckpt_path=ckpt_path)
        (made,) = run.optimizers
        (group,) = made.param_groups
        assert group["lr"] == pytest.approx(0.02 * (1 - 0.9 * 12 / 20))
        held = {id(param) for param in group["params"]}
        assert held >= {id(p) for p in module.parameters() if p.requires_grad}
        return module

    module, _ = resumed(fit, tmp_path, 6, steps=(6,))
    plain = fit(ratio=1.0)
    assert any(".lora_B" in name for name in differing(weights(module), weights(plain)))
    assert not differing(weights(plain), weights(fit(ratio=None)))


class Halved(task_class(ROOTS[0])):
    """Steps once with half of the rate, which it sets while gradients are computed."""

    def training_step(self, batch, batch_idx):
        (group,) = self.optimizers().optimizer.param_groups
        group["lr"] = 0.05
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_rate_that_is_set_during_the_step_counts(tmp_path):
    torch.manual_seed(5)
    module = Halved()
    ours = strategy(target_modules=TARGETS, lora_plus_lr_ratio=4.0)
    make_trainer(tmp_path, ours, max_steps=1).fit(module, loader())
    factor = module.model.layers[0].lora_B["default"].weight
    torch.testing.assert_close(factor.detach(), -0.05 * 4.0 * factor.grad)
    torch.testing.assert_close(
        module.model.head.bias.detach(),
        build("linears").head.bias - 0.05 * module.model.head.bias.grad,
    )


def test_without_a_closure_and_after_an_error():
    module = build("linears")
    lightning_peft.inject(module, r=2, target_modules=TARGETS)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        assert engine.scale_b_rates(module, [optimizer], 3.0) == 2
    before = weights(module)
    for param in module.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None

    def fails():
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        optimizer.step(fails)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    for name, param in module.named_parameters():
        rate = 1.5 if ".lora_B" in name else 0.5
        if param.requires_grad:
            torch.testing.assert_close(param.detach(), before[name] - rate)


def test_what_cannot_have_two_rates_is_refused(tmp_path):
    for wrong in (0, -1.0, float("inf"), True):
        with pytest.raises(ConfigError, match="lora_plus_lr_ratio=.*: the learning rate of B"):
            strategy(lora_plus_lr_ratio=wrong)

    class OfItsOwn(torch.optim.SGD):
        """Of another module than torch's."""

    class Task(task_class(ROOTS[0])):
        def configure_optimizers(self):
            return OfItsOwn(self.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="OfItsOwn may keep more than a state for each tensor"):
        make_trainer(tmp_path, strategy(lora_plus_lr_ratio=2.0)).fit(Task(), loader())
    ia3 = strategy(
        r=16,
        lora_plus_lr_ratio=2.0,
        peft_config={"peft_type": "IA3", "target_modules": TARGETS, "feedforward_modules": []},
    )
    with pytest.raises(ConfigError, match="no optimizer holds a factor B"):
        make_trainer(tmp_path, ia3).fit(task(), loader())


class FrozenFactors(task_class(ROOTS[0])):
    """Trains ``B`` alone, and the head."""

    def configure_optimizers(self):
        for name, param in self.named_parameters():
            if ".lora_A." in name:
                param.requires_grad_(False)
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_a_frozen_in_configure_optimizers_stays_through_a_resume(tmp_path):
    def fit(ckpt_path=None, callbacks=()):
        torch.manual_seed(5 if ckpt_path is None else 1000)
        module = FrozenFactors()
        given = {"callbacks": list(callbacks), "max_epochs": 2}
        run = make_trainer(tmp_path / "root", strategy(target_modules=TARGETS), **given)
        run.fit(module, loader(), ckpt_path=ckpt_path)
        return module

    module, _ = resumed(fit, tmp_path, 6, steps=(6,))
    torch.manual_seed(5)
    start = FrozenFactors()
    lightning_peft.inject(start, r=4, target_modules=TARGETS)
    for name, param in engine.adapter_parameters(module).items():
        same = torch.equal(param, engine.adapter_parameters(start)[name])
        assert same == (".lora_A." in name), name
