"""Validation and samples within a share of a run's time."""

import importlib

import lightning.pytorch as pl
import pytest
import short_runs
import torch
from jsonargparse import Namespace
from torch.utils.data import DataLoader

from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.recorder import RunRecorder
from lightning_peft.runs.schedule import schedule_of
from lightning_peft.runs.session import RunSession
from lightning_peft.tasks import validation_budget
from lightning_peft.tasks.callbacks import BestCheckpoint, StopEarly
from lightning_peft.tasks.validation_budget import ValidationBudget, describe

ROWS = torch.arange(12.0)[:, None]


def budget(validation=0.0, samples=0.0, root=ROOTS[0], **given):
    made = bind_to_lightning(ValidationBudget, root)(**given)
    made._validation, made._sampled = validation, samples
    return made


# Two epochs of 450 s: a tenth of the whole is 100 s.
@pytest.mark.parametrize(
    ("validation", "samples", "per_epoch", "every", "when"),
    [
        (5, 5, 4, 1, "with each"),
        (5, 7, 4, 1, "at the end"),
        (15, 5, 2, 1, "at the end"),
        (30, 5, 1, 1, "at the end"),
        (45, 5, 1, 2, "at the end"),
        (500, 50, 1, 2, "at the end"),
    ],
)
def test_validations_become_fewer_where_they_take_long(validation, samples, per_epoch, every, when):
    chosen = budget(validation, samples).choose(2, 450)
    assert chosen == {"per_epoch": per_epoch, "every_epochs": every, "samples": when}
    if (validation, samples) != (500, 50):
        count = 2 * per_epoch // every
        assert (1 + count) * validation + samples * (1 + (count if when[0] == "w" else 1)) <= 100


def test_short_runs_validate_as_often_as_they_may():
    assert budget(1.9, 0.3).choose(2, 1)["samples"] == "with each"
    assert budget(2.0, 0.5).choose(2, 1)["samples"] == "at the end"
    assert budget(1.0, most=2).choose(1, 1)["per_epoch"] == 2


def test_rare_validations_include_the_last_epoch():
    assert budget(12.0).choose(6, 60) == {
        "per_epoch": 1, "every_epochs": 3, "samples": "at the end"
    }  # fmt: skip


def test_the_line_gives_numbers_and_the_setting():
    choice = budget(15, 5).choose(2, 450) | {
        "share": 0.1, "validation_seconds": 15.04, "samples_seconds": 5.0, "batch_seconds": 4.5
    }  # fmt: skip
    assert describe(choice, 100) == (
        "Validation and samples get 10% of the run's time, or 20 s in short runs: a validation "
        "takes 15.0 s, samples 5.0 s, and an epoch of training about 450 s. The run validates "
        "twice an epoch and generates samples at the end; trainer.val_check_interval sets another "
        "interval."
    )


def fit(folder, callbacks, root=ROOTS[0], resumed=None, scheduler=None, rows=ROWS, **options):
    """Trains a line; returns the steps at which it was validated."""

    class Samples(importlib.import_module(root).Callback):
        seconds, waits_for_end = 0.0, False
        steps: list = []
        sample_base = staticmethod(lambda *_: None)

        def on_validation_end(self, trainer, module):
            if not self.waits_for_end or trainer.should_stop:
                self.steps.append(trainer.global_step)

    samples = Samples()
    samples.steps = []
    settings = {"max_epochs": 2, "num_sanity_val_steps": -1, "enable_checkpointing": True}
    settings |= {"callbacks": [*callbacks, samples], "default_root_dir": str(folder), **options}
    module = short_runs.line(root, scheduler=scheduler)
    trainer = short_runs.trainer(root=root, **settings)
    trainer.fit(module, DataLoader(rows, 1), DataLoader(ROWS[:1], 1), ckpt_path=resumed)
    return module.validated, samples.steps, trainer


@pytest.fixture
def slow(monkeypatch):
    """A clock by which a validation takes 15 s and a batch 37.5 s."""
    monkeypatch.setattr(
        ValidationBudget, "_end_validation", lambda self, trainer: vars(self).update(_validation=15)
    )
    times = iter(range(10**6))
    monkeypatch.setattr(validation_budget, "_now", lambda module: 37.5 * next(times))


@pytest.mark.parametrize("root", ROOTS)
def test_a_run_validates_as_often_as_it_may(root, tmp_path):
    steps, samples, _ = fit(tmp_path, [budget(root=root)], root)
    assert steps == [3, 6, 9, 12, 15, 18, 21, 24]
    assert samples == [0, *steps]


@pytest.mark.parametrize("root", ROOTS)
def test_a_run_decides_before_its_second_validation(root, tmp_path, slow):
    steps, samples, _ = fit(tmp_path, [budget(root=root)], root)
    # Two batches are timed before the first one is due.
    assert steps == [6, 12, 18, 24]
    assert samples == [0, 24]


def test_samples_between_steps_count_and_are_no_training(tmp_path, slow):
    class Between(importlib.import_module(ROOTS[0]).Callback):
        seconds, waits_for_end = 0.0, False

        def sample_base(self, trainer, module):
            self.seconds = 30.0

    made = budget()
    fit(tmp_path, [made, Between()])
    chosen = made.decided["validation"]
    assert (chosen["samples_seconds"], chosen["batch_seconds"]) == (30.0, 37.5)


def test_the_decision_waits_for_the_samples_of_the_base(tmp_path, slow):
    class AfterStep(importlib.import_module(ROOTS[0]).Callback):
        seconds, waits_for_end = 0.0, False

        def sample_base(self, trainer, module):
            self.seconds = 30.0 * min(trainer.global_step, 1)
            return not self.seconds

    made = budget()
    rows = torch.arange(40.0)[:, None]
    fit(tmp_path, [made, AfterStep()], rows=rows, max_epochs=1, accumulate_grad_batches=16)
    chosen = made.decided["validation"]
    assert (chosen["samples_seconds"], chosen["samples"]) == (30.0, "at the end")


@pytest.mark.parametrize("given", [{"val_check_interval": 4}, {"check_val_every_n_epoch": 2}])
def test_an_interval_of_the_user_wins(given, tmp_path, slow):
    steps, samples, _ = fit(tmp_path, [budget()], **given)
    assert steps == ([24] if "check_val_every_n_epoch" in given else [4, 8, 12, 16, 20, 24])
    assert samples == [0, *steps]


def test_a_resumed_and_a_repeated_run_keep_the_decision(tmp_path, slow, monkeypatch):
    recorder = bind_to_lightning(RunRecorder, ROOTS[0])(tmp_path / "run")
    _, _, trainer = fit(tmp_path, [budget(), recorder], max_epochs=1)
    decided = RunFolder(tmp_path / "run").decided()
    assert decided["validation"]["per_epoch"] == 2
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    monkeypatch.setattr(ValidationBudget, "choose", None)
    steps, samples, _ = fit(tmp_path, [budget()], resumed=tmp_path / "half.ckpt", max_epochs=3)
    assert steps == [18, 24, 30, 36]
    assert [step for step in samples if step > 12] == [36]
    again = bind_to_lightning(RunRecorder, ROOTS[0])(tmp_path / "again", decided=decided)
    assert fit(tmp_path, [budget(), again])[0] == [6, 12, 18, 24]


def decided(per_epoch, every, samples="at the end"):
    """A budget that has decided before."""
    made = budget()
    made.decided["validation"] = {"per_epoch": per_epoch, "every_epochs": every, "samples": samples}
    return made


# 12 batches an epoch.
@pytest.mark.parametrize(
    ("per_epoch", "every", "options", "expected"),
    [
        (1, 1, {"max_steps": 7}, [7]),
        (4, 1, {"max_steps": 8}, [3, 6, 8]),
        (1, 2, {"max_steps": 18}, [18]),
        (1, 2, {"max_epochs": 3}, [24, 36]),
        (2, 1, {"max_steps": 3, "accumulate_grad_batches": 5}, [1, 3]),
        (4, 1, {"max_epochs": 1, "rows": ROWS[:7]}, [2, 4, 6, 7]),
        (2, 1, {"rows": ROWS[:11]}, [6, 11, 17, 22]),
    ],
)
def test_a_run_ends_with_a_validation(tmp_path, per_epoch, every, options, expected):
    class Schedule(pl.Callback):
        def on_train_start(self, trainer, module):
            self.known = schedule_of(trainer)

    schedule, best = Schedule(), bind_to_lightning(BestCheckpoint, ROOTS[0])()
    options = {"max_epochs": -1 if "max_steps" in options else 2, **options}
    steps, samples, trainer = fit(tmp_path, [decided(per_epoch, every), schedule, best], **options)
    assert steps == expected
    assert samples == [0, trainer.global_step]
    assert trainer.check_val_every_n_epoch == 1
    assert schedule.known.until(trainer.global_step) == len(expected)
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] in expected


def test_a_run_that_is_stopped_ends_with_a_validation(tmp_path):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            trainer.should_stop = trainer.global_step == 5

    steps, samples, _ = fit(tmp_path, [decided(1, 2), Stops()])
    assert (steps, samples) == ([5], [0, 5])


class Saves(pl.Callback):
    """Saves in the validation at a step."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_validation_end(self, trainer, module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("ended", "step", "longer", "expected"),
    [
        ({"max_epochs": -1, "max_steps": 8}, 8, {"max_epochs": 3}, [24, 36]),
        ({"max_epochs": 1}, 12, {"max_epochs": 3}, [24, 36]),
        ({"max_epochs": 2}, 24, {"max_epochs": 5}, [48, 60]),
        ({"max_epochs": 2}, 24, {"max_epochs": -1, "max_steps": 27}, [27]),
    ],
)
def test_a_run_that_goes_on_behind_its_last_validation(tmp_path, ended, step, longer, expected):
    path = tmp_path / "end.ckpt"
    steps, _, _ = fit(tmp_path, [decided(1, 2), Saves(path, step)], **ended)
    assert steps[-1] == step
    steps, samples, trainer = fit(tmp_path, [budget()], resumed=path, **longer)
    assert trainer.global_step == expected[-1]
    assert steps == expected
    # The one before is that of the rows before training.
    assert samples[-1] == expected[-1]
    # No batch is counted twice, or left out.
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == expected[-1]


def plateau(optimizer):
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"},
    }


@pytest.mark.parametrize(
    ("monitoring", "scheduler", "name"),
    [
        (lambda: pl.callbacks.EarlyStopping("val_loss"), None, "EarlyStopping"),
        (lambda: pl.callbacks.ModelCheckpoint(monitor="val_loss"), None, "ModelCheckpoint"),
        (lambda: pl.callbacks.ModelCheckpoint(), plateau, "ReduceLROnPlateau"),
    ],
)
def test_who_counts_on_the_interval_of_lightning_keeps_it(
    tmp_path, monitoring, scheduler, name, monkeypatch
):
    lines = []
    monkeypatch.setattr(validation_budget, "log_info", lambda strategy, line: lines.append(line))
    steps, samples, _ = fit(tmp_path, [decided(4, 2), monitoring()], scheduler=scheduler)
    assert steps == [12, 24]
    assert samples == [0, 12, 24]
    assert lines == [
        "ValidationBudget leaves the run with one validation an epoch, which "
        f"{name}(monitor='val_loss') counts on."
    ]


def test_callbacks_that_follow_validations_go_along(tmp_path):
    ours = [bind_to_lightning(cls, ROOTS[0])() for cls in (BestCheckpoint, StopEarly)]
    of_training = pl.callbacks.ModelCheckpoint(monitor="train_loss", every_n_epochs=9)
    assert fit(tmp_path, [decided(4, 2), *ours, of_training])[0] == [15, 18, 21, 24]


@pytest.mark.parametrize(("interval", "left"), [(1.0, 1), (0.5, 1), (None, 2)])
def test_an_interval_in_a_config_wins_where_it_is_the_default(tmp_path, interval, left):
    names = ["lightning_peft.tasks.ValidationBudget", "lightning_peft.tasks.BestCheckpoint"]
    trainer = Namespace(
        val_check_interval=interval, callbacks=[Namespace(class_path=name) for name in names]
    )
    with RunSession("fit", "mine") as session:
        session.begin(Namespace(trainer=trainer, run_dir=str(tmp_path / "run")), "", ROOTS[0])
    assert [one.class_path for one in trainer.callbacks] == names[-left:]


def test_impossible_budgets():
    with pytest.raises(ConfigError, match=r"ValidationBudget\(share=1.5, most=0\): share is betw"):
        ValidationBudget(1.5, 0)
