"""Lightning's finetuning callbacks: adapters begin to train at some epoch, and the base never."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import (
    ROOTS,
    differing,
    lightning,
    loader,
    outputs,
    resumed,
    strategy,
    task_class,
    weights,
)
from modules import trainer as make_trainer

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import UnsupportedError


def staged_class(root: str) -> Any:
    class Staged(task_class(root)):
        backbone = property(lambda self: self.model.layers)

        def __init__(self) -> None:
            super().__init__("linears")
            self.seen: list[dict[str, torch.Tensor]] = []
            self.rates: list[list[float]] = []

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)

        def on_train_epoch_end(self) -> None:
            self.seen.append(weights(self))
            self.rates.append([group["lr"] for group in self.optimizers().param_groups])

    return Staged


def fitted(folder: Any, root: str = ROOTS[0], method: str = "lora", **given: Any) -> Any:
    backbone = lightning(root).callbacks.BackboneFinetuning
    callback = backbone(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5)
    torch.manual_seed(5)
    module = staged_class(root)()
    callbacks = [callback, *given.pop("callbacks", ())]
    ours = strategy(method, root)
    run = make_trainer(folder / "root", ours, root, callbacks=callbacks, max_epochs=3)
    run.fit(module, loader(shuffle=True), **given)
    return module


@pytest.mark.parametrize(
    ("root", "method"), [(ROOTS[0], "qlora"), (ROOTS[1], "lora")], ids=["nf4", "dense"]
)
def test_adapters_train_from_the_epoch_on_and_the_base_never(root, method, tmp_path):
    module = fitted(tmp_path, root, method)
    first, second, third = module.seen
    adapters = [name for name in first if "lora_" in name]
    frozen = engine.record_of(module).frozen
    assert adapters
    assert all(not first[name].any() for name in adapters if "lora_B" in name)
    for before, after in ((first, second), (second, third)):
        changed = set(differing(before, after))
        assert {name for name in adapters if "lora_B" in name} <= changed
        assert "model.head.weight" in changed
        assert not changed & frozen
    assert [len(rates) for rates in module.rates] == [1, 2, 2]
    assert module.rates[1] == pytest.approx([0.02, 0.01])
    assert not any(module.get_parameter(name).requires_grad for name in frozen)
    held = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    assert not held & {id(module.get_parameter(name)) for name in frozen}


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    def fit(ckpt_path=None, callbacks=()):
        return fitted(tmp_path, callbacks=callbacks, ckpt_path=ckpt_path)

    module, found = resumed(fit, tmp_path, 3, steps=(3, 9, 15))
    assert found[15].model.layers[0].lora_A["default"].weight.requires_grad
    loaded = lightning_peft.load_from_checkpoint(staged_class(ROOTS[0]), tmp_path / "step=18.ckpt")
    assert torch.equal(outputs(loaded), outputs(module))


def test_stages_of_ones_own(tmp_path):
    class Layers(lightning(ROOTS[0]).callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.model)

        def finetune_function(self, pl_module, epoch, optimizer):
            layers = [pl_module.model.head, *pl_module.model.layers[::-1]]
            if epoch < len(layers):
                self.unfreeze_and_add_param_group(layers[epoch], optimizer)

    class Empty(staged_class(ROOTS[0])):
        def configure_optimizers(self):
            self.first = torch.nn.Parameter(torch.zeros(1))
            return torch.optim.Adam([self.first], lr=0.5)

    module = Empty()
    run = make_trainer(tmp_path, strategy(), callbacks=[Layers()], max_epochs=3)
    run.fit(module, loader())
    changed = [
        {name.split(".")[2] for name in differing(*pair) if "lora_B" in name}
        for pair in zip(module.seen, module.seen[1:], strict=False)
    ]
    assert changed == [{"1"}, {"0", "1"}]


def test_layers_that_are_unfrozen_in_one_epoch_all_train(tmp_path):
    base = lightning(ROOTS[0]).callbacks.BaseFinetuning

    class Layers(base):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.backbone)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                # By the class too, which finds no method of ours.
                self.unfreeze_and_add_param_group(pl_module.backbone[0], optimizer)
                base.unfreeze_and_add_param_group(pl_module.backbone[1], optimizer)

    before = base.__dict__["filter_on_optimizer"]
    module = staged_class(ROOTS[0])()
    run = make_trainer(tmp_path, strategy(), callbacks=[Layers()], max_epochs=2)
    run.fit(module, loader())
    changed = [name for name in differing(*module.seen) if "layers" in name and "lora_B" in name]
    assert len(changed) == 2
    assert len(run.optimizers[0].param_groups) == 3
    assert base.__dict__["filter_on_optimizer"] is before


def test_a_second_fit_trains_what_the_first_one_froze(tmp_path):
    callback = lightning(ROOTS[0]).callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    module = staged_class(ROOTS[0])()
    for given in ({"max_epochs": 1}, {"max_epochs": 3}):
        make_trainer(tmp_path, strategy(), callbacks=[callback], **given).fit(module, loader())
    assert [len(rates) for rates in module.rates] == [1, 1, 2, 2]
    assert [len(x) for x in callback.state_dict()["internal_optimizer_metadata"].values()] == [2]
    staged = [name for name in module.seen[0] if "layers" in name and "lora_B" in name]
    assert not set(staged) & set(differing(*module.seen[:2]))
    assert set(staged) <= set(differing(*module.seen[1:3]))
    make_trainer(tmp_path, strategy(), callbacks=[callback], max_epochs=1).fit(module, loader())
    make_trainer(tmp_path, strategy()).fit(module, loader())
    assert not set(staged) & set(differing(*module.seen[3:5]))
    assert set(staged) <= set(differing(*module.seen[4:]))


def test_what_cannot_be_staged_is_refused(tmp_path):
    callbacks = lightning(ROOTS[0]).callbacks

    class OwnSetup(callbacks.BackboneFinetuning):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)

    module = staged_class(ROOTS[0])()
    with pytest.raises(UnsupportedError, match=r"OwnSetup has a `setup` of its own"):
        make_trainer(tmp_path, "lora", callbacks=[OwnSetup()]).fit(module, loader())
    both = [callbacks.BackboneFinetuning(), callbacks.EMAWeightAveraging()]
    with pytest.raises(UnsupportedError, match="with EMAWeightAveraging|with WeightAveraging"):
        make_trainer(tmp_path, "lora", callbacks=both).fit(module, loader())
    for given in ({"devices": 2}, {"num_nodes": 2}):
        staged = [callbacks.BackboneFinetuning()]
        several = make_trainer(tmp_path, strategy(), callbacks=staged, **given)
        with pytest.raises(UnsupportedError, match="in several processes"):
            lightning_peft.plugin.adapter_checks.check_compatibility(
                _of(several, module), several.strategy, False
            )


def _of(trainer: Any, module: Any) -> Any:
    module.trainer = trainer
    return module


def test_without_adapters_it_is_lightnings_own(tmp_path):
    callback = lightning(ROOTS[0]).callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    module = staged_class(ROOTS[0])()
    run = make_trainer(tmp_path, "lora", callbacks=[callback], max_epochs=1)
    run.fit(module, loader())
    plain = staged_class(ROOTS[0])()
    make_trainer(tmp_path, "auto", callbacks=[callback], max_epochs=2).fit(plain, loader())
    assert "model.layers.0.weight" in differing(*plain.seen)
