"""The recorder as a callback in Python, without the command line."""

import importlib
import json

import pytest
import torch
from torch.utils.data import DataLoader
from trainer_fixtures import QUIET, small_module

from lightning_peft.errors import DivergenceError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.plugin.strategies import LoRAStrategy
from lightning_peft.runs import load
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.recorder import RunRecorder


def run(root, folder, broken=None, callbacks=(), epochs=2, resumed=None, **options):
    lightning = importlib.import_module(root)
    rows = torch.randn(12, 8)
    trainer = lightning.Trainer(
        strategy=bind_to_lightning(LoRAStrategy, root)(r=2, announce=False),
        max_epochs=epochs,
        num_sanity_val_steps=-1,
        callbacks=[bind_to_lightning(RunRecorder, root)(folder), *callbacks],
        default_root_dir=str(folder),
        **QUIET,
        **options,
    )
    trainer.fit(
        small_module(lightning, broken), DataLoader(rows, 4), DataLoader(rows, 6), ckpt_path=resumed
    )
    return trainer


@pytest.mark.parametrize("root", ROOTS)
def test_a_run_in_python_is_recorded(root, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "SHORTEST", 0.005)
    run(root, tmp_path)
    folder = RunFolder(tmp_path)
    assert folder.status.state == "finished"
    assert folder.status.step == folder.status.total_steps == 6
    rows = list(folder.rows(folder.metrics))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    validated = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(validated) == [0, 3, 6]
    result = json.loads(folder.result.read_text())
    assert result["before"] == {"val_loss": validated[0]}
    assert result["after"]["val_loss"] == validated[6]
    assert result["method"] == "lora"
    assert result["rows"] == 24
    trained = [row for row in rows if "train_loss" in row]
    assert all(row["learning_rate"] == 0.01 and row["grad_norm"] > 0 for row in trained)
    assert folder.newest_checkpoint() is not None
    provenance = json.loads(folder.provenance.read_text())
    assert provenance["base"]["(whole module)"]["fingerprint"]
    assert provenance["decided"] == folder.decided()
    assert all(row["process_bytes"] > 0 for row in folder.rows(folder.load))
    assert folder.load.is_file()


def test_decisions_are_kept_and_taken_again(tmp_path):
    root, seen = ROOTS[0], []

    class Decides(importlib.import_module(root).Callback):
        def on_train_batch_start(self, trainer, *given):
            decided = trainer.strategy.lifecycle.decided
            seen.append(dict(decided))
            decided.setdefault("number", {"value": len(seen)})

    run(root, tmp_path, callbacks=[Decides()])
    folder = RunFolder(tmp_path)
    assert seen[:2] == [{}, {"number": {"value": 1}}]
    assert folder.decided() == {"number": {"value": 1}}
    seen.clear()
    run(root, tmp_path, callbacks=[Decides()], epochs=3, resumed=folder.newest_checkpoint())
    assert seen[0] == {"number": {"value": 1}}
    seen.clear()
    run(root, tmp_path, callbacks=[Decides()])
    assert seen[0] == {}


def test_an_error_is_written_down(tmp_path):
    with pytest.raises(RuntimeError, match="on fire"):
        run(ROOTS[0], tmp_path, broken=2)
    folder = RunFolder(tmp_path)
    assert folder.status.state == "failed"
    error = json.loads(folder.error.read_text())
    assert error["error"] == "RuntimeError"
    assert error["message"] == "the disk is on fire"
    assert "training_step" in "".join(error["traceback"])


def test_a_loss_that_is_no_number_is_reported_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "mean", lambda tensor: tensor.sum() * float("nan"))
    with pytest.raises(DivergenceError, match="After step 1, 4 of the tensors that train hold NaN"):
        run(ROOTS[0], tmp_path, limit_val_batches=0)
    folder = RunFolder(tmp_path)
    assert json.loads(folder.error.read_text())["error"] == "DivergenceError"
    alerts = [event for event in folder.rows(folder.events) if event["kind"] == "nan"]
    assert len(alerts) == 1
    assert alerts[0]["step"] == 1
    assert "learning rate" in alerts[0]["text"]
    assert alerts[0]["alert"] == {"of": "train_loss"}
