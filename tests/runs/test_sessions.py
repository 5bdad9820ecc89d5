"""Runs that are stopped and gone on with: what is counted, what is kept, and when they validate."""

import json

import pytest
import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader
from trainer_fixtures import QUIET, small_module

from lightning_peft.plugin.interruption import SaveOnInterrupt
from lightning_peft.plugin.namespace import bind_to_lightning
from lightning_peft.plugin.strategies import LoRAStrategy
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.recorder import RunRecorder
from lightning_peft.runs.schedule import schedule_of

ROOT = "pytorch_lightning"


class Asks(lightning.Callback):
    """Asks for a stop, as another program does: when a step is done, or in a validation."""

    def __init__(self, folder, step, at):
        self.folder, self.step, self.at = folder, step, at

    def ask(self, trainer, at):
        if trainer.global_step == self.step and at == self.at and not trainer.sanity_checking:
            self.folder.write(self.folder.control, {"stop": True})

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.ask(trainer, "step")

    def on_validation_batch_end(self, trainer, module, outputs, batch, index, loader=0):
        self.ask(trainer, f"row {index}")


def fit(folder, checkpoint=None, asks=None, **options):
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    recorder = bind_to_lightning(RunRecorder, ROOT)(folder)
    best = lightning.callbacks.ModelCheckpoint(monitor="val_loss", filename="best")
    interruption = bind_to_lightning(SaveOnInterrupt, ROOT)()
    given = {"max_epochs": 2, "num_sanity_val_steps": -1, **options}
    trainer = lightning.Trainer(
        # Which goes on with the batches that are left.
        strategy=bind_to_lightning(LoRAStrategy, ROOT)(r=2, announce=False),
        callbacks=[*([Asks(recorder.folder, *asks)] if asks else []), recorder, interruption, best],
        accelerator="cpu",
        **QUIET,
        **given,
    )
    trainer.fit(
        small_module(lightning), DataLoader(rows, 2), DataLoader(rows, 4), ckpt_path=checkpoint
    )
    return trainer, recorder, interruption


def rows_of(folder, name):
    found = RunFolder(folder).rows(RunFolder(folder).metrics)
    return [(row["step"], row[name]) for row in found if name in row]


def test_a_run_that_goes_on_counts_from_its_first_session(tmp_path):
    """Four batches make a step, so the first batches after the resumption are of none."""
    whole, one = tmp_path / "whole", tmp_path / "parts"
    fit(whole, accumulate_grad_batches=4, max_epochs=4)
    _, _, interruption = fit(one, asks=(5, "step"), accumulate_grad_batches=4, max_epochs=4)
    folder = RunFolder(one)
    assert (folder.status.state, folder.status.step) == ("stopped", 5)
    assert folder.status.rows == 5 * 8
    # As if the session had taken long, and much memory.
    status = json.loads(folder.status_file.read_text())
    folder.write(folder.status_file, {**status, "started": status["started"] - 1_000})
    folder.append(folder.metrics, {"step": 5, "peak_process_bytes": 10**13})
    before = rows_of(one, "train_loss")
    _, recorder, _ = fit(
        one, checkpoint=interruption.saved, accumulate_grad_batches=4, max_epochs=4
    )
    after = rows_of(one, "train_loss")
    # Of no step was anything logged twice, and none but the new ones came.
    assert after[: len(before)] == before
    assert [step for step, _ in after] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert after == rows_of(whole, "train_loss")
    result = json.loads(folder.result.read_text())
    assert 1_000 < result["seconds"] < 1_100
    assert result["rows"] == 8 * 8
    assert result["peak_memory"]["process_bytes"] == 10**13
    # One that begins again in the same folder does not go on.
    fit(one, accumulate_grad_batches=4)
    assert json.loads(folder.result.read_text())["seconds"] < 100
    assert json.loads(folder.result.read_text())["rows"] == 4 * 8


@pytest.mark.parametrize("at", ["row 1", "row 2"])
def test_a_stop_does_not_wait_for_the_rest_of_a_validation(tmp_path, at):
    whole, one = tmp_path / "whole", tmp_path / "parts"
    trainer, *_ = fit(whole, val_check_interval=4)
    expected = trainer.lightning_module.state_dict()
    _, _, interruption = fit(one, asks=(4, at), val_check_interval=4)
    status = RunFolder(one).status
    assert (status.state, status.step, status.part) == ("stopped", 4, None)
    assert status.checkpoint == "checkpoints/interrupted.ckpt"
    # Of rows that were not all looked at, there is no metric, and no best checkpoint.
    assert [step for step, _ in rows_of(one, "val_loss")] == [0]
    assert not (one / "checkpoints" / "best.ckpt").exists()
    trainer, recorder, _ = fit(one, checkpoint=interruption.saved, val_check_interval=4)
    assert RunFolder(one).status.state == "finished"
    for name, value in trainer.lightning_module.state_dict().items():
        assert torch.equal(value, expected[name])
    found, wanted = dict(rows_of(one, "val_loss")), dict(rows_of(whole, "val_loss"))
    assert {8, 12, 16} <= set(found)
    assert all(wanted[step] == value for step, value in found.items())


class Counts(lightning.Callback):
    def __init__(self):
        self.steps = []
        self.schedule = None

    def on_train_start(self, trainer, module):
        self.schedule = schedule_of(trainer)

    def on_validation_start(self, trainer, module):
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 3},
        {"val_check_interval": 0.25},
        {"accumulate_grad_batches": 3},
        {"accumulate_grad_batches": 2, "val_check_interval": 4},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 5},
        {"limit_train_batches": 5, "val_check_interval": 2},
        {"max_steps": 13, "max_epochs": -1},
    ],
)
def test_validations_are_known_before_they_come(tmp_path, options):
    counts = Counts()
    rows = torch.randn(16, 8)
    trainer = lightning.Trainer(
        callbacks=[counts],
        enable_checkpointing=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
        **QUIET,
        **{"max_epochs": 4, **options},
    )
    trainer.fit(small_module(lightning), DataLoader(rows, 2), DataLoader(rows, 8))
    for step in range(trainer.global_step + 1):
        assert counts.schedule.until(step) == sum(one <= step for one in counts.steps)


@pytest.mark.parametrize(
    "options", [{"limit_val_batches": 0}, {"val_check_interval": "00:00:01:00"}]
)
def test_what_cannot_be_known_is_not_counted(options):
    trainer = lightning.Trainer(
        enable_checkpointing=False, accelerator="cpu", max_steps=2, **QUIET, **options
    )
    rows = torch.randn(16, 8)
    trainer.fit(small_module(lightning), DataLoader(rows, 2), DataLoader(rows, 8))
    assert schedule_of(trainer) is None


def test_how_far_a_validation_is_can_be_read_while_it_runs(tmp_path):
    seen = []

    class Reads(lightning.Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, index, loader=0):
            recorder = next(one for one in trainer.callbacks if isinstance(one, RunRecorder))
            recorder._updated = 0.0
            status = RunFolder(tmp_path).status
            seen.append((trainer.sanity_checking, status.phase, status.part))

    recorder = bind_to_lightning(RunRecorder, ROOT)(tmp_path)
    rows = torch.randn(17, 8)
    trainer = lightning.Trainer(
        callbacks=[Reads(), recorder],
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=-1,
        **QUIET,
    )
    trainer.fit(small_module(lightning), DataLoader(rows, 4), DataLoader(rows, 8))
    rows_done = [{"unit": "rows", "done": done, "of": 17} for done in (0, 8, 16)]
    assert seen[1:3] == [(True, "evaluating before training", part) for part in rows_done[1:]]
    assert seen[4:] == [(False, "validating", part) for part in rows_done[1:]]
    assert RunFolder(tmp_path).status.part is None
