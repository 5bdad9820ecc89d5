"""Runs that ended early, and loaders that their users change: as in Lightning alone."""

from __future__ import annotations

import logging

import pytest
import torch
from modules import (
    ROOTS,
    differing,
    lightning,
    loader,
    resumed,
    saver,
    seed,
    strategy,
    task,
    task_class,
    weights,
)
from modules import trainer as make_trainer
from torch.utils.data import DataLoader, IterableDataset

import lightning_peft
from lightning_peft.plugin.interruption import SaveOnInterrupt
from lightning_peft.plugin.namespace import bind_to_lightning

Task = task_class(ROOTS[0])
Callback = lightning(ROOTS[0]).Callback


class Noting(Task):
    """Notes what runs, in order."""

    def __init__(self, *args, **given):
        super().__init__(*args, **given)
        self.noted = []

    def training_step(self, batch, batch_idx):
        self.noted.append(f"{self.current_epoch}.{batch_idx}")
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.noted.append("validated")

    def on_train_epoch_end(self):
        self.noted.append("ended")

    def optimizer_step(self, *args, **given):
        super().optimizer_step(*args, **given)
        self.noted.append("step")


class StopAt(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 8


class Interrupt(Callback):
    """Asks for a stop as Ctrl-C does."""

    def __init__(self, listener):
        self.listener = listener

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 7:
            self.listener.request(stop=True)


def run_two(folder, method, way, accumulate=1, generator=False):
    """Fits until the run is stopped inside its second epoch, and continues from the last file."""
    data = loader(shuffle=True, generator=torch.Generator().manual_seed(3) if generator else None)
    callbacks, given = [saver(ROOTS[0], folder, save_last=True)], {"max_epochs": 9}
    if way == "max_steps":
        given["max_steps"] = 8
    elif way == "should_stop":
        callbacks.append(StopAt())
    else:
        listener = bind_to_lightning(SaveOnInterrupt, ROOTS[0])()
        callbacks += [listener, Interrupt(listener)]
    common = {"accumulate_grad_batches": accumulate, "default_root_dir": folder}
    first = make_trainer(folder, method(), callbacks=callbacks, **given, **common)
    first.fit(Noting(), data, loader())
    # An interrupt leaves out the validation that ends the fit, and none after it.
    assert first.limit_val_batches == 1.0
    module = Noting()
    second = make_trainer(folder, method(), max_epochs=4, enable_checkpointing=False, **common)
    second.fit(module, data, loader(), ckpt_path=folder / "last.ckpt")
    return module.noted, first.global_step, second.global_step


@pytest.mark.parametrize("way", ["max_steps", "should_stop", "interrupt"])
def test_a_run_that_ended_inside_an_epoch(way, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lightning_peft"):
        ours = run_two(tmp_path / "ours", strategy, way)
    report = [r.getMessage() for r in caplog.records if "ended inside epoch 1" in r.message]
    assert len(report) == 1
    assert "the rest of epoch 1 is not trained on" in report[0]
    if way != "interrupt":
        assert ours == run_two(tmp_path / "stock", lambda: "auto", way)
    noted, stopped, steps = ours
    assert (stopped, steps) == (8, 20)
    assert noted[:14] == [f for i in range(6) for f in (f"2.{i}", "step")] + ["validated", "ended"]


def test_gradients_of_several_batches_after_such_a_run(tmp_path):
    noted, stopped, steps = run_two(tmp_path / "ours", strategy, "max_steps", 2)
    assert (stopped, steps) == (8, 11)
    assert (noted, stopped, steps) == run_two(tmp_path / "stock", lambda: "auto", "max_steps", 2)


def test_the_order_of_an_own_generator_after_such_a_run(tmp_path):
    """The generator goes on where it was, not from the start of the epoch that was broken off."""
    rows = loader().dataset

    class Seeing(Task):
        seen: list[list[int]]

        def loss(self, batch):
            self.seen.append(batch.tolist())
            chosen = [rows[int(index)] for index in batch]
            return super().loss([torch.stack(part) for part in zip(*chosen, strict=True)])

    def numbers(generator):
        return DataLoader(list(range(24)), batch_size=4, shuffle=True, generator=generator)

    orders = []
    for method in (strategy, lambda: "auto"):
        module, data = Seeing(), numbers(torch.Generator().manual_seed(3))
        module.seen = []
        orders.append(module.seen)
        points = saver(ROOTS[0], tmp_path, filename=str(len(orders)))
        stopped = make_trainer(tmp_path, method(), max_steps=8, max_epochs=9, callbacks=[points])
        stopped.fit(module, data)
        if len(orders) == 1:
            # Another process makes another generator.
            data = numbers(torch.Generator().manual_seed(4))
        file = tmp_path / f"{len(orders)}.ckpt"
        again = Seeing()
        again.seen = module.seen
        make_trainer(tmp_path, method(), max_epochs=3, enable_checkpointing=False).fit(
            again, data, ckpt_path=file
        )
    assert len(orders[0]) == 14
    assert orders[0] == orders[1]


class Curriculum(DataLoader):
    stage = 0

    def __iter__(self):
        for x, y in super().__iter__():
            yield x, y, self.stage


class Staged(Task):
    def __init__(self):
        super().__init__()
        self.stages = []

    def training_step(self, batch, batch_idx):
        self.stages.append(batch[2])
        return super().training_step(batch[:2], batch_idx)


class KeepsItsLoader(Staged):
    def train_dataloader(self):
        self.kept = Curriculum(loader().dataset, batch_size=8)
        return self.kept

    def on_train_epoch_start(self):
        self.kept.stage = self.current_epoch


class AsksTheTrainer(KeepsItsLoader):
    def on_train_epoch_start(self):
        self.trainer.train_dataloader.stage = self.current_epoch


class Sets(Callback):
    def __init__(self, data):
        self.data = data

    def on_train_epoch_start(self, trainer, pl_module):
        self.data.stage = trainer.current_epoch
        assert trainer.train_dataloader is self.data


@pytest.mark.parametrize("cls", [KeepsItsLoader, AsksTheTrainer, Staged])
def test_what_is_set_on_the_loader_while_training_counts(cls, tmp_path):
    data = Curriculum(loader().dataset, batch_size=8) if cls is Staged else None
    callbacks = [] if data is None else [Sets(data)]
    module = cls()
    given = {"max_epochs": 3, "enable_checkpointing": False, "callbacks": callbacks}
    trainer = make_trainer(tmp_path, **given)
    trainer.fit(module, data)
    assert module.stages == [0] * 3 + [1] * 3 + [2] * 3
    used = trainer.train_dataloader
    assert type(used) is Curriculum
    assert used is (module.kept if data is None else data)


def test_the_users_combination_is_what_it_was(tmp_path):
    combined = lightning(ROOTS[0]).utilities.CombinedLoader([loader(), loader()], "min_size")
    before = list(combined.flattened)

    class Two(Task):
        def training_step(self, batch, batch_idx):
            return self.loss(batch[0]) + self.loss(batch[1])

    trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(Two(), combined)
    assert trainer.global_step == 12
    assert all(a is b for a, b in zip(combined.flattened, before, strict=True))
    assert all(a is b for a, b in zip(trainer.train_dataloader, before, strict=True))
    assert len(list(combined)) == 6
    assert "setup_data" not in vars(trainer.fit_loop)
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)


class Queue(IterableDataset):
    """A source that is gone once it is read."""

    def __init__(self, rows):
        self.left = list(rows)

    def __iter__(self):
        for _ in range(4):
            yield self.left.pop(0)


def test_a_stream_loses_nothing_when_a_run_goes_on(tmp_path):
    numbered = [(x, y, torch.tensor(i)) for i, (x, y) in enumerate(loader().dataset)]
    queue, seen = Queue(numbered), []

    class Seeing(Task):
        def training_step(self, batch, batch_idx):
            seen.extend(batch[2].tolist())
            return super().training_step(batch[:2], batch_idx)

        def configure_optimizers(self):
            # Makes the loader before the optimizer's state is restored.
            assert self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    data = DataLoader(queue, batch_size=2)
    points = saver(ROOTS[0], tmp_path, filename="one")
    make_trainer(tmp_path, max_epochs=2, callbacks=[points]).fit(Seeing(), data)
    make_trainer(tmp_path, max_epochs=4, enable_checkpointing=False).fit(
        Seeing(), data, ckpt_path=tmp_path / "one.ckpt"
    )
    assert seen == list(range(16))
    assert len(queue.left) == 8


class NoisyStream(IterableDataset):
    """Draws in the process that trains, one item ahead of training."""

    def __iter__(self):
        for x, y in loader().dataset:
            yield x + torch.randn_like(x), y


def test_a_stream_that_draws_goes_on_as_it_would_have(tmp_path):
    def fit(ckpt_path=None, callbacks=()):
        module = task()
        make_trainer(
            tmp_path / "root",
            strategy(lora_dropout=0.3),
            max_epochs=2,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
        ).fit(module, DataLoader(NoisyStream(), batch_size=4), loader(), ckpt_path=ckpt_path)
        return module

    _, found = resumed(fit, tmp_path, 1, steps=(2, 5, 6, 9))
    assert [len(module.losses) for module in found.values()] == [10, 7, 6, 3]


def test_validation_draws_apart_from_training(tmp_path):
    """How often a run is validated does not change what it learns."""
    found = []
    for interval in (None, 1.0, 0.5):
        seed(5)
        module = task()
        given = {} if interval is None else {"val_check_interval": interval}
        trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False, **given)
        trainer.fit(module, loader(shuffle=True), None if not given else loader(shuffle=True))
        found.append(module.losses)
    assert found[0] == found[1] == found[2]


def test_a_loader_drawn_by_the_module_is_drawn_again(tmp_path):
    class Drawing(Task):
        def train_dataloader(self):
            rows = loader().dataset
            return DataLoader([rows[int(i)] for i in torch.randperm(24)[:16]], batch_size=4)

    def fit(ckpt_path=None, callbacks=()):
        module = Drawing()
        make_trainer(
            tmp_path / "root",
            max_epochs=3,
            reload_dataloaders_every_n_epochs=1,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
        ).fit(module, ckpt_path=ckpt_path)
        return module

    _, found = resumed(fit, tmp_path, 3, steps=(3, 6, 9))
    assert [len(module.losses) for module in found.values()] == [9, 6, 3]


def test_weights_of_the_resumed_run_are_loaded_without_a_trainer(tmp_path):
    points = saver(ROOTS[0], tmp_path, save_last=True)
    module = task()
    make_trainer(tmp_path, max_steps=8, callbacks=[points]).fit(module, loader())
    loaded = lightning_peft.load_from_checkpoint(Task, tmp_path / "last.ckpt")
    assert not differing(weights(loaded), weights(module))
