"""Validation and samples within a share of a run's time."""

import importlib

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.recorder import RunRecorder
from lightning_peft.tasks import validation_budget
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
        "Validation and samples get 10% of the run's time at most: a validation takes 15.0 s, "
        "samples 5.0 s, and an epoch of training about 450 s. The run validates twice an epoch and "
        "generates samples at the end; trainer.val_check_interval sets another interval."
    )


def fit(folder, callbacks, root=ROOTS[0], resumed=None, **options):
    """Trains a line; returns the steps at which it was validated."""
    lightning, steps = importlib.import_module(root), []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(1, 1)

        def training_step(self, batch, index):
            return self.line(batch).square().mean()

        def validation_step(self, batch, index):
            if not self.trainer.sanity_checking:
                steps.append(self.trainer.global_step)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-4)

    class Samples(lightning.Callback):
        seconds, waits_for_end = 0.0, False
        steps: list = []

        def on_validation_end(self, trainer, module):
            if not self.waits_for_end:
                self.steps.append(trainer.global_step)

    samples = Samples()
    samples.steps = []
    settings = {"max_epochs": 2, "num_sanity_val_steps": -1, "logger": False, **options}
    trainer = lightning.Trainer(
        callbacks=[*callbacks, samples],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **settings,
    )
    trainer.fit(Module(), DataLoader(ROWS, 1), DataLoader(ROWS[:1], 1), ckpt_path=resumed)
    return steps, samples.steps, trainer


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


def test_impossible_budgets():
    with pytest.raises(ConfigError, match=r"ValidationBudget\(share=1.5, most=0\): share is betw"):
        ValidationBudget(1.5, 0)
