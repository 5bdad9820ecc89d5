"""A resumed run is the uninterrupted run, bit for bit."""

from __future__ import annotations

import random
from weakref import WeakSet

import numpy as np
import pytest
import torch
from modules import (
    ROOTS,
    differing,
    lightning,
    loader,
    resumed,
    rows,
    saver,
    seed,
    strategy,
    task,
    task_class,
    weights,
)
from modules import trainer as make_trainer
from torch.utils.data import DataLoader, Dataset, IterableDataset

# Where checkpoints are written, and how many each run of three epochs of six batches writes.
POINTS = {
    "epoch end": ({"save_on_train_epoch_end": True}, 3),
    "mid-epoch": ({"every_n_train_steps": 4}, 4),
    "validation": ({"save_on_train_epoch_end": False}, 6),
}


def run(folder, method, root, module, data, points=None, ckpt_path=None, **given):
    """Fits for three epochs with dropout, and returns the trainer."""
    callbacks = [saver(root, folder, save_top_k=-1, **points)] if points is not None else []
    trainer = make_trainer(
        folder / "root",
        strategy(method, root, lora_dropout=0.3),
        root,
        max_epochs=3,
        val_check_interval=0.5,
        enable_checkpointing=bool(callbacks),
        callbacks=callbacks,
        **given,
    )
    trainer.fit(module, data, loader(module.kind), ckpt_path=ckpt_path)
    return trainer


def flat(state) -> dict[str, torch.Tensor]:
    """An optimizer's or scheduler's state as values by dotted name."""
    if isinstance(state, (list, tuple)):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return {"": state}
    inner = {key: flat(item) for key, item in state.items()}
    return {f"{key}.{rest}": value for key in inner for rest, value in inner[key].items()}


def assert_same(resumed, module, straight, expected) -> None:
    assert module.losses
    assert module.losses == expected.losses[-len(module.losses) :]
    assert not differing(weights(module), weights(expected))
    for mine, theirs in zip(resumed.optimizers, straight.optimizers, strict=True):
        a, b = flat(mine.state_dict()["state"]), flat(theirs.state_dict()["state"])
        assert a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
        assert mine.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    for mine, theirs in zip(
        resumed.lr_scheduler_configs, straight.lr_scheduler_configs, strict=True
    ):
        assert flat(mine.scheduler.state_dict()) == flat(theirs.scheduler.state_dict())
    assert (resumed.global_step, resumed.current_epoch) == (
        straight.global_step,
        straight.current_epoch,
    )
    assert resumed.callback_metrics["val_loss"] == straight.callback_metrics["val_loss"]


@pytest.mark.parametrize(
    ("point", "method", "root"),
    [
        ("epoch end", "qlora", ROOTS[1]),
        ("mid-epoch", "lora", ROOTS[1]),
        ("mid-epoch", "qlora", ROOTS[0]),
        ("validation", "lora", ROOTS[0]),
    ],
)
def test_resume_is_exact(point, method, root, tmp_path):
    points, count = POINTS[point]
    expected = task(root, kind="llama")
    straight = run(tmp_path, method, root, expected, loader("llama", True), points)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == count
    for file in files:
        seed(1000)
        module = task(root, kind="llama")
        step = int(file.stem.partition("step=")[2].partition("-")[0])
        trainer = run(tmp_path, method, root, module, loader("llama", True), ckpt_path=file)
        if step == 18:
            assert not module.losses
            continue
        assert len(module.losses) == 18 - step
        assert_same(trainer, module, straight, expected)


class Shuffled:
    """A batch sampler of the user's own that draws from Python's and NumPy's generators."""

    def __iter__(self):
        order = list(range(24))
        random.shuffle(order)
        shift = np.random.randint(24)
        order = order[shift:] + order[:shift]
        return iter([order[i : i + 4] for i in range(0, 24, 4)])

    def __len__(self):
        return 6


class Noisy(Dataset):
    """Augments in the process that loads, from the default generator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        x, y = self.rows[index]
        return x + 0.1 * torch.rand_like(x), y


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def with_generator():
    return loader(shuffle=True, generator=torch.Generator().manual_seed(7))


def with_workers():
    return loader(
        shuffle=True, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )


def with_augmentation():
    return DataLoader(Noisy(loader().dataset), batch_size=4, shuffle=True)


DATA = {
    "own generator": with_generator,
    "workers": with_workers,
    "augmentation": with_augmentation,
    "batch sampler": lambda: DataLoader(loader().dataset, batch_sampler=Shuffled()),
    "without a length": lambda: DataLoader(Stream(loader().dataset), batch_size=4),
    "two, one shorter": lambda: [
        loader(shuffle=True),
        DataLoader(loader().dataset[:16], batch_size=4, shuffle=True),
    ],
    "Lightning's combination": lambda: lightning(ROOTS[0]).utilities.CombinedLoader(
        {"a": loader(shuffle=True), "b": loader(shuffle=True)}, "min_size"
    ),
}


class Task(task_class(ROOTS[0])):
    """Takes one batch or several, and draws in hooks."""

    def training_step(self, batch, batch_idx):
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        several = isinstance(parts[0], (list, tuple))
        value = sum(self.loss(part) for part in parts) if several else self.loss(batch)
        self.losses.append(value.item())
        return value

    def on_train_epoch_start(self):
        self.losses.append(torch.rand(()).item())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        # Without a length there is no such number; Lightning says -1.
        total = 12 if steps < 0 else int(steps)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=total + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def resume_everywhere(folder, data, method="lora", **given):
    """Runs through, then resumes from every checkpoint, with another seed and new data."""
    settings = {"max_epochs": 2, **given}

    def fit(ckpt_path=None, callbacks=()):
        module = Task()
        trainer = make_trainer(
            folder / "root",
            strategy(method, lora_dropout=0.3),
            enable_checkpointing=bool(callbacks),
            callbacks=list(callbacks),
            **settings,
        )
        trainer.fit(module, data(), ckpt_path=ckpt_path)
        return module

    expected, found = resumed(fit, folder, 5)
    steps = {module.trainer.global_step for module in (expected, *found.values())}
    assert len(steps) == 1
    return expected


@pytest.mark.parametrize("kind", DATA)
def test_resume_is_exact_with_data(kind, tmp_path):
    expected = resume_everywhere(tmp_path, DATA[kind])
    assert len(expected.losses) == 14


@pytest.mark.parametrize(
    "given",
    [
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"max_steps": 12, "max_epochs": -1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"precision": "bf16-true"},
        {"precision": "bf16-mixed"},
        {"limit_train_batches": 4},
    ],
    ids=lambda given: next(iter(given)),
)
def test_resume_is_exact_with_trainer(given, tmp_path):
    resume_everywhere(tmp_path, lambda: loader(shuffle=True), method="qlora", **given)


def test_the_users_loader_stays_what_it_was(tmp_path):
    """One loader object through an uninterrupted run, a resumed one, and by hand."""
    data = loader(shuffle=True)
    before = dict(vars(data))
    expected = resume_everywhere(tmp_path, lambda: data)
    assert len(expected.losses) == 14
    assert type(data) is DataLoader
    assert vars(data).keys() == before.keys()
    assert data.dataset is before["dataset"]
    assert len(list(data)) == 6


def test_each_epoch_has_one_iterator(tmp_path):
    """Those of epochs before are gone, and their worker processes with them."""

    alive, counts = WeakSet(), []

    class Counted(DataLoader):
        def __iter__(self):
            iterator = super().__iter__()
            alive.add(iterator)
            return iterator

    class Watched(task_class(ROOTS[0])):
        def on_train_batch_start(self, *_):
            counts.append(len(alive))

    given = {"max_epochs": 3, "limit_train_batches": 2}
    run = make_trainer(tmp_path, strategy("lora"), **given)
    run.fit(Watched(), Counted(rows("linears", 12), 4))
    assert counts == [1] * 6


def test_one_trainer_resumes_its_own_run(tmp_path):
    points = saver(ROOTS[0], tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
    trainer = make_trainer(tmp_path / "root", max_epochs=2, callbacks=[points])
    first, second = Task(), Task()
    trainer.fit(first, loader(shuffle=True))
    trainer.fit(second, loader(shuffle=True), ckpt_path=tmp_path / "step=5.ckpt")
    assert second.losses == first.losses[6:]
    assert not differing(weights(second), weights(first))


def test_a_learning_rate_search_leaves_no_trace(tmp_path):
    tried = []
    for search in (False, True):
        seed(4)
        module = task()
        trainer = make_trainer(
            tmp_path, "qlora", max_epochs=2, enable_checkpointing=False, logger=False
        )
        if search:
            tuner = lightning(ROOTS[0] + ".tuner").Tuner(trainer)
            tuner.lr_find(module, loader(shuffle=True), num_training=8, update_attr=False)
            assert len(module.losses) == 8
            module.losses.clear()
        trainer.fit(module, loader(shuffle=True))
        tried.append(module.losses)
    assert tried[0] == tried[1]
    assert not list(tmp_path.rglob("*.safetensors"))
