"""Loaders with a state, manual optimization, exceptions and special paths: what others resume."""

from __future__ import annotations

import logging

import pytest
import torch
from modules import (
    ROOTS,
    differing,
    lightning,
    loader,
    outputs,
    resumed,
    saver,
    seed,
    task,
    task_class,
    weights,
)
from modules import trainer as make_trainer
from torch.utils.data import DataLoader

Task = task_class(ROOTS[0])
OnExceptionCheckpoint = lightning(ROOTS[0]).callbacks.OnExceptionCheckpoint


def fit(module, folder, data, ckpt_path=None, callbacks=()):
    """Fits for two epochs of six batches, without validation."""
    given = {"max_epochs": 2, "callbacks": list(callbacks)}
    trainer = make_trainer(folder / "root", enable_checkpointing=bool(callbacks), **given)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


class Stateful(DataLoader):
    """Goes on where it was, by the interface that Lightning looks for."""

    at = 0

    def __iter__(self):
        return self.rest(list(super().__iter__()))

    def rest(self, rows):
        for index in range(self.at % len(rows), len(rows)):
            self.at = index + 1
            yield rows[index]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Several(Task):
    """Takes one batch or two, and requests the number of steps before Lightning resumes."""

    def training_step(self, batch, batch_idx):
        parts = batch if isinstance(batch[0], (list, tuple)) else [batch]
        value = sum(self.loss(part) for part in parts)
        self.losses.append(value.item())
        return value

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 12
        return super().configure_optimizers()


def stateful():
    return Stateful(loader().dataset, batch_size=4)


@pytest.mark.parametrize("data", [stateful, lambda: [stateful(), loader(shuffle=True)]])
def test_loaders_with_a_state(data, tmp_path):
    _, found = resumed(lambda **given: fit(Several(), tmp_path, data(), **given), tmp_path, 4)
    assert {step: len(module.losses) for step, module in found.items()} == {4: 8, 8: 4, 12: 0}


class ByHand(Task):
    """Two optimizers; one steps after each batch, the other with the gradients of two."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        often, seldom = self.optimizers()
        value = self.loss([batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]])
        self.losses.append(value.item())
        self.manual_backward(value)
        often.step()
        often.zero_grad()
        if batch_idx % 2:
            seldom.step()
            seldom.zero_grad()

    def configure_optimizers(self):
        adapters = [p for n, p in self.named_parameters() if "lora_" in n and p.requires_grad]
        known = {id(p) for p in adapters}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return torch.optim.AdamW(rest, 0.01), torch.optim.AdamW(adapters, 0.01)


def test_two_optimizers_by_hand(tmp_path):
    def run(**given):
        return fit(ByHand(), tmp_path, loader(shuffle=True), **given)

    _, found = resumed(run, tmp_path, 1, steps=(1, 3, 4, 13))
    # Three steps of both in two batches.
    left = {step: 12 - len(module.losses) for step, module in found.items()}
    assert left == {1: 1, 3: 2, 4: 3, 13: 9}


class Fails(Task):
    def training_step(self, batch, batch_idx):
        value = super().training_step(batch, batch_idx)
        if len(self.losses) == 9:
            raise OSError("the disk is full")
        return value


class Keeping(OnExceptionCheckpoint):
    """Leaves the file there when the fit is over."""

    def teardown(self, trainer, pl_module, stage):
        pass


def test_an_exception_inside_a_step(tmp_path, caplog):
    seed(2)
    straight = fit(task(), tmp_path, loader(shuffle=True))
    seed(2)
    with pytest.raises(OSError, match="the disk is full"):
        fit(Fails(), tmp_path, loader(shuffle=True), callbacks=[Keeping(tmp_path)])
    with caplog.at_level(logging.WARNING, logger="lightning_peft"):
        module = fit(task(), tmp_path, loader(shuffle=True), tmp_path / "on_exception.ckpt")
    report = [r.getMessage() for r in caplog.records if "inside a step" in r.message]
    assert len(report) == 1
    assert "batch 2 of epoch 1 is trained on again" in report[0]
    # The batch that failed comes again; nothing random is in these steps.
    assert module.losses == straight.losses[8:]


def test_special_paths(tmp_path):
    best = saver(ROOTS[0], tmp_path / "c", monitor="val_loss", save_last=True, filename="{step}")
    module = task()
    run = make_trainer(tmp_path, max_epochs=3, callbacks=[best])
    run.fit(module, loader(shuffle=True), loader())
    kept = weights(module)
    run.save_checkpoint(tmp_path / "hpc_ckpt_7.ckpt")
    for path, folder in (("hpc", tmp_path), ("last", tmp_path)):
        again = saver(ROOTS[0], tmp_path / "c", monitor="val_loss", save_last=True)
        other = make_trainer(folder, max_epochs=3, callbacks=[again])
        found = task()
        other.fit(found, loader(shuffle=True), loader(), ckpt_path=path)
        assert other.global_step == 18
        assert not differing(weights(found), kept)
    results = run.validate(module, loader(), ckpt_path="best", verbose=False)
    assert results[0]["val_loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)
    assert outputs(module).shape == (4, 3)
