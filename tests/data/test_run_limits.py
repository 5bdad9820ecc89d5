"""What a data module decides for a run: rows to validate with, and workers."""

import logging

import pytest
import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from lightning_peft.data import row_data_module, validation_rows
from lightning_peft.data.images import ImageData
from lightning_peft.data.row_data_module import automatic_workers

from .conftest import pairs


@pytest.fixture
def fitted(write, make, monkeypatch):
    """Makes data of 30 rows to train on and 12 to validate with, in a fit."""
    monkeypatch.setattr(validation_rows, "LEAST_VALIDATION", 2)

    def fitted(rows="auto", test_data=None, **trainer):
        data = make(
            write(pairs(30)),
            validation_data=write(pairs(12, 100), "more.jsonl"),
            test_data=test_data,
            validation_rows=rows,
        )
        settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
        data.trainer = pl.Trainer(accelerator="cpu", devices=1, **{**settings, **trainer})
        data.trainer.state.fn = TrainerFn.FITTING
        return data

    return fitted


@pytest.mark.parametrize(
    ("rows", "trainer", "count"),
    [
        ("auto", {}, 4),  # a fifteenth of 60
        ("auto", {"max_epochs": 1}, 2),
        ("auto", {"max_epochs": 9}, 12),
        ("auto", {"max_epochs": -1, "max_steps": 15, "accumulate_grad_batches": 3}, 12),
        ("auto", {"max_steps": 12}, 3),
        ("auto", {"limit_val_batches": 2}, 12),
        (5, {}, 5),
        (50, {}, 12),
        (None, {}, 12),
    ],
)
def test_a_fit_validates_with_as_many_rows_as_pay(rows, trainer, count, fitted):
    data = fitted(rows, **trainer)
    assert len(data.val_dataloader().dataset) == count
    assert data.validated == (count, 12)


def test_the_rows_are_spread_evenly(fitted, caplog):
    with caplog.at_level(logging.INFO):
        taken = fitted().val_dataloader().dataset
    assert list(taken.indices) == [0, 3, 6, 9]
    assert "Validation takes 4 of 12 rows, spread evenly" in caplog.text
    assert len(fitted().loader("train").dataset) == 30


def test_only_a_fit_takes_a_part_of_the_rows(fitted):
    data = fitted()
    # Also where nothing was fitted before.
    data.trainer.state.fn = TrainerFn.VALIDATING
    assert len(data.val_dataloader().dataset) == 12
    data.trainer.state.fn = TrainerFn.FITTING
    assert len(data.val_dataloader().dataset) == 4
    for fn, loader in [
        (TrainerFn.VALIDATING, data.val_dataloader),
        (TrainerFn.TESTING, data.val_dataloader),
        (TrainerFn.PREDICTING, data.predict_dataloader),
    ]:
        data.trainer.state.fn = fn
        assert len(loader().dataset) == 12
    # The numbers after training, next to those before it.
    data.validates_as_in_fit = True
    assert list(data.val_dataloader().dataset.indices) == [0, 3, 6, 9]
    data.trainer.state.fn = TrainerFn.FITTING
    assert len(data.predict_dataloader().dataset) == 12


def test_a_resumed_run_validates_with_the_rows_that_it_began_with(fitted):
    begun = fitted(max_epochs=1)
    assert len(begun.val_dataloader().dataset) == 2
    saved = begun.state_dict()
    resumed = fitted(max_epochs=9)
    resumed.trainer.ckpt_path = "last.ckpt"
    resumed.load_state_dict(saved)
    assert list(resumed.val_dataloader().dataset.indices) == [0, 6]
    assert resumed.state_dict() == saved
    # Another fit with the same data begins with rows of its own, and so does a number of the user.
    resumed.trainer.ckpt_path = None
    assert len(resumed.val_dataloader().dataset) == 12
    chosen = fitted(5)
    chosen.trainer.ckpt_path = "last.ckpt"
    chosen.load_state_dict(saved)
    assert len(chosen.val_dataloader().dataset) == 5
    # A checkpoint of an earlier version holds no number.
    old = fitted()
    old.trainer.ckpt_path = "last.ckpt"
    old.load_state_dict({"key": saved["key"]})
    assert len(old.val_dataloader().dataset) == 4


def test_workers_are_left_open(fitted, tmp_path):
    assert fitted().train_dataloader().num_workers == 0
    images = ImageData(str(tmp_path), processor="none")
    assert images.workers == 0
    images.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False)
    assert images.workers == 0
    assert ImageData(str(tmp_path), processor="none", num_workers=3).workers == 3


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(row_data_module, "usable_cores", lambda: 8)
    assert [automatic_workers(n) for n in (1, 2, 3, 4, 8, 9)] == [4, 3, 1, 1, 0, 0]
