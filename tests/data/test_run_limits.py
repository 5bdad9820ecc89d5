"""What a data module decides for a run: rows to validate with, and workers."""

import logging

import pytest
import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from lightning_peft.data import row_data_module
from lightning_peft.data.images import ImageData
from lightning_peft.data.row_data_module import automatic_workers

from .conftest import pairs


@pytest.fixture
def fitted(write, make, monkeypatch):
    """Makes data of 30 rows to train on and 12 to validate with, in a fit."""
    monkeypatch.setattr(row_data_module, "LEAST_VALIDATION", 2)

    def fitted(validation_rows="auto", **trainer):
        data = make(
            write(pairs(30)),
            validation_data=write(pairs(12, 100), "more.jsonl"),
            validation_rows=validation_rows,
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


def test_the_rows_are_spread_evenly_and_stay_the_same(fitted, caplog):
    data = fitted()
    with caplog.at_level(logging.INFO):
        taken = data.val_dataloader().dataset
    assert list(taken.indices) == [0, 3, 6, 9]
    assert "Validation takes 4 of 12 rows, spread evenly" in caplog.text
    data.trainer.state.fn = TrainerFn.VALIDATING
    assert list(data.val_dataloader().dataset.indices) == [0, 3, 6, 9]
    assert len(fitted().loader("train").dataset) == 30


def test_a_validation_without_a_fit_takes_all_rows(fitted):
    data = fitted()
    data.trainer.state.fn = TrainerFn.VALIDATING
    assert len(data.val_dataloader().dataset) == 12


def test_workers_are_left_open(fitted, tmp_path):
    assert fitted().train_dataloader().num_workers == 0
    images = ImageData(str(tmp_path), processor="none")
    assert images.workers == 0
    images.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False)
    assert images.workers == 0
    assert ImageData(str(tmp_path), processor="none", num_workers=3).workers == 3


def test_workers_share_the_cores(monkeypatch):
    class Process:
        def cpu_affinity(self):
            return list(range(8))

    monkeypatch.setattr(row_data_module.psutil, "Process", Process)
    assert [automatic_workers(n) for n in (1, 2, 3, 4, 8, 9)] == [4, 3, 1, 1, 0, 0]
