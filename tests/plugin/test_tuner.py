"""Lightning's tuner: trials may diverge or run out of memory, and everything is as before after."""

from __future__ import annotations

import logging

import pytest
import torch
from modules import (
    ROOTS,
    differing,
    lightning,
    loader,
    rows,
    strategy,
    task_class,
    trainer,
    weights,
)
from torch.utils.data import DataLoader


class Tuned(task_class(ROOTS[0])):
    """A module of which the tuner changes the batch size; its loss may explode."""

    scale, limit, seen = 1.0, 1_000, ()

    def __init__(self):
        super().__init__()
        self.batch_size = 2
        self.seen = []

    def train_dataloader(self):
        return DataLoader(rows("linears", 64), batch_size=self.batch_size)

    def val_dataloader(self):
        return loader()

    def training_step(self, batch, batch_idx):
        self.seen.append(len(batch[0]))
        if len(batch[0]) > self.limit:
            raise RuntimeError("CUDA out of memory.")
        return (self(batch) * self.scale).square().square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def tuner(run):
    return lightning(ROOTS[0]).tuner.Tuner(run)


@pytest.mark.parametrize(
    ("method", "verify"), [("lora", "cheap"), pytest.param("qlora", "full", marks=pytest.mark.long)]
)
def test_a_trial_that_diverges_does_not_end_the_search(method, verify, tmp_path):
    module = Tuned()
    run = trainer(tmp_path, strategy(method, verify=verify))
    run.validate(module, loader(), verbose=False)
    before = weights(module)
    module.scale = 1e6
    run = trainer(tmp_path, strategy(method, verify=verify))
    found = tuner(run).scale_batch_size(module, max_trials=2, steps_per_trial=3)
    assert found == 4
    assert set(module.seen) == {2, 4}
    assert not differing(weights(module), before)


@pytest.mark.long
def test_running_out_of_memory_is_the_end_of_the_search(tmp_path):
    module = Tuned()
    module.limit = 2
    run = trainer(tmp_path, "lora")
    assert tuner(run).scale_batch_size(module, max_trials=6, steps_per_trial=2) == 2
    assert max(module.seen) == 4
    module.scale = 1e-3
    run.fit(module)
    assert not any(o._optimizer_step_post_hooks for o in run.optimizers)


def test_the_first_step_is_looked_at_once_in_a_run(tmp_path, caplog):
    """A warning belongs to the module and not to each trial."""
    caplog.set_level(logging.WARNING, "lightning_peft.plugin.training_checks")
    module = Tuned()
    torch.nn.init.zeros_(module.model.head.weight)
    torch.nn.init.ones_(module.model.head.bias)
    finder = lightning(ROOTS[0]).callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=2)
    trainer(tmp_path, "lora", callbacks=[finder]).fit(module)
    assert set(module.seen) == {2, 4}
    message = [r.getMessage() for r in caplog.records if "no gradient reached" in r.getMessage()]
    assert len(message) == 1
