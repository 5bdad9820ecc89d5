"""Adapters that the module's constructor brings, or a run before: trained on, or refused."""

from __future__ import annotations

import pytest
import torch
from modules import ROOTS, Linears, loader, outputs, steps_class, strategy, task, trainer
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import LifecycleError
from lightning_peft.plugin.namespace import bind_to_lightning

Steps = steps_class(ROOTS[0])


def defaults(name="LoRAStrategy"):
    return bind_to_lightning(getattr(lightning_peft, name), ROOTS[0])(announce=False)


def loaded(folder, **settings):
    """A model with the adapter of ``folder``, on the base that it was trained on."""
    torch.manual_seed(0)
    model = Linears()
    lightning_peft.load_adapter(model, folder, **settings)
    return model


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = Linears()
    lightning_peft.inject(model, r=3)
    for layer in model.layers:
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_the_constructor_loads_is_trained_on(folder, tmp_path):
    """With what comes around it: a second name, a new layer, checkpoints, resuming."""

    class Continued(Steps):
        def __init__(self):
            super().__init__()
            self.model = loaded(folder, is_trainable=True)
            self.first = self.model.layers[0]
            self.proj = nn.Linear(3, 3)

        def forward(self, batch):
            return self.proj(super().forward(batch))

    module = Continued()
    before = {n: p.clone() for n, p in module.named_parameters() if "lora_" in n}
    file = tmp_path / "one.ckpt"
    run = trainer(tmp_path, defaults(), max_epochs=1, limit_train_batches=1)
    run.fit(module, loader())
    run.save_checkpoint(file)
    after = dict(module.named_parameters())
    moved = {n: (after[n] - value).abs().max().item() for n, value in before.items()}
    assert len(moved) == 4
    # One step of AdamW.
    assert all(0 < distance < 0.03 for distance in moved.values())
    assert {n for n, p in after.items() if p.requires_grad and "lora_" not in n} == {
        "model.head.weight", "model.head.bias", "proj.weight", "proj.bias"
    }  # fmt: skip
    again = lightning_peft.load_from_checkpoint(Continued, file)
    assert torch.equal(outputs(again), outputs(module))
    trainer(tmp_path, defaults(), max_epochs=2).fit(Continued(), loader(), ckpt_path=file)
    with pytest.raises(LifecycleError, match="r=3, asked for 5"):
        trainer(tmp_path, strategy("lora", r=5)).fit(Continued(), loader())
    with pytest.raises(LifecycleError, match="quantization is None, asked for"):
        trainer(tmp_path, defaults("QLoRAStrategy")).fit(Continued(), loader())


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_module_that_was_trained_is_trained_on_inside_of_another(method, tmp_path):
    class Outer(Steps):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.kind = inner, "linears"

        def forward(self, batch):
            return self.inner(batch)

    inner = task()
    trainer(tmp_path, method).fit(inner, loader())
    before = outputs(inner)
    outer = Outer(inner)
    engine.adopt_inner_adapters(outer)
    assert torch.equal(outputs(outer), before)
    assert engine.record_of(inner) is None
    trainer(tmp_path, method).fit(outer, loader())
    assert set(engine.record_of(outer).parts) == {"inner"}


@pytest.mark.parametrize("part", ["frozen", "layer", "teacher"])
def test_trained_adapters_are_not_replaced_in_silence(part, folder, tmp_path):
    class Holder(Steps):
        def __init__(self):
            super().__init__()
            self.model = loaded(folder, is_trainable=part != "frozen")
            if part == "teacher":
                self.student = Linears()
                self.model.requires_grad_(False).eval()
            if part == "layer":
                kept, self.model = self.model, Linears()
                self.model.layers[1] = kept.layers[1]

    module = Holder()
    before = module.model.layers[1].lora_B["default"].weight.clone()
    with pytest.raises(
        LifecycleError, match=r"layers\.1(.|\n)*take their place(.|\n)*is_trainable"
    ):
        trainer(tmp_path).fit(module, loader())
    assert torch.equal(module.model.layers[1].lora_B["default"].weight, before)
