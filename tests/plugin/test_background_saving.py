"""``async_save=True``: the same checkpoints, written while training goes on."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
from modules import ROOTS, differing, lightning, loader, saver, strategy, task, trainer, weights

from lightning_peft.errors import ConfigError, StorageError
from lightning_peft.plugin.background_saving import BackgroundSaves

ROOT = ROOTS[0]


def fit(folder, *callbacks, ckpt_path=None, **given):
    torch.manual_seed(5)
    module = task(kind="residuals")
    ours = strategy(target_modules=["up", "down"], **{"async_save": True, **given})
    run = trainer(folder, ours, callbacks=list(callbacks))
    run.fit(module, loader("residuals"), ckpt_path=ckpt_path)
    return run, module


def points(folder, **given):
    given = {"filename": "{step}", "every_n_train_steps": 2, "save_top_k": -1, **given}
    return saver(ROOT, folder, **given)


class Gate:
    """Lets files be flushed only when it is open, and notes which files there were at each step."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.flush, self.open = folder, os.fsync, threading.Event()
        self.seen = {}
        monkeypatch.setattr(os, "fsync", self.wait)

    def wait(self, file):
        assert self.open.wait(60)
        self.flush(file)

    def callback(self, opens_at):
        def on_train_batch_end(callback, trainer, *given):
            step = trainer.global_step
            self.seen[step] = sorted(path.name for path in self.folder.glob("*.ckpt"))
            if step == opens_at:
                self.open.set()

        return type("Watch", (lightning(ROOT).Callback,), locals())()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    gate = Gate(tmp_path / "later", monkeypatch)
    _, module = fit(tmp_path, points(gate.folder), gate.callback(opens_at=3))
    # The save of step 4 waits for that of step 2.
    assert [gate.seen[step] for step in (2, 3)] == [[], []]
    assert gate.seen[5][0] == "step=2.ckpt"
    _, straight = fit(tmp_path, points(tmp_path / "at once"), async_save=False)
    assert not differing(weights(module), weights(straight))
    names = ["adapters", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    for name in names[1:]:
        found, expected = (
            torch.load(folder / name, weights_only=True)
            for folder in (gate.folder, tmp_path / "at once")
        )
        assert not differing(found["state_dict"], expected["state_dict"])
        assert repr(found["optimizer_states"]) == repr(expected["optimizer_states"])
        (one, other) = (
            (folder / "adapters" / name[:-5] / "adapter_model.safetensors").read_bytes()
            for folder in (gate.folder, tmp_path / "at once")
        )
        assert one == other
    assert sorted(os.listdir(gate.folder)) == names
    _, resumed = fit(tmp_path, ckpt_path=gate.folder / "step=4.ckpt")
    assert not differing(weights(resumed), weights(straight))


def test_what_was_not_written_is_said_and_replaces_nothing(tmp_path):
    """The last whole checkpoint stays, though a newer one was to take its place."""
    full = os.path.getsize(__file__) // 100

    class Fills(lightning(ROOT).Callback):
        def on_train_batch_end(self, trainer, *given):
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (full, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            StorageError, match=r"step=4\.ckpt' was not written|adapters/step=4' was"
        ):
            fit(tmp_path, points(tmp_path / "saved", save_top_k=1), Fills())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "saved").glob("*.ckpt")] == ["step=2.ckpt"]
    assert not list(tmp_path.rglob(".incomplete-*"))
    run, _ = fit(tmp_path, ckpt_path=tmp_path / "saved" / "step=2.ckpt")
    assert run.global_step == 6


def test_a_run_that_fails_waits_for_its_checkpoint(tmp_path, monkeypatch):
    gate = Gate(tmp_path / "saved", monkeypatch)
    threading.Timer(0.5, gate.open.set).start()

    class Fails(lightning(ROOT).Callback):
        def on_train_batch_start(self, trainer, *given):
            if trainer.global_step == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, points(gate.folder), Fails())
    assert torch.load(gate.folder / "step=2.ckpt", weights_only=True)["global_step"] == 2
    assert not [one for one in threading.enumerate() if one.name.startswith("checkpoints")]


def test_two_callbacks_that_save_under_one_name(tmp_path, monkeypatch):
    """The second one looks for a free name while the file of the first is written."""
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (time.sleep(0.02), flush(file)))
    both = [points(tmp_path / "saved", every_n_train_steps=n, save_top_k=1) for n in (2, 3)]
    fit(tmp_path, *both)
    names = [path.name for path in (tmp_path / "saved").glob("*.ckpt")]
    assert sorted(names) == ["step=6-v1.ckpt", "step=6.ckpt"]
    assert sorted(Path(one.best_model_path).name for one in both) == sorted(names)
    assert not any("file_exists" in vars(one) for one in both)


def test_a_save_outside_of_a_run_is_done_when_it_returns(tmp_path):
    run, _ = fit(tmp_path)
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt", weights_only=True)["global_step"] == 6
    run.strategy.remove_checkpoint(tmp_path / "after.ckpt")
    assert not (tmp_path / "after.ckpt").exists()


def test_nothing_is_done_after_what_failed():
    saves, done = BackgroundSaves(True), []
    saves.run(lambda: done.append(1 / 0))
    saves.run(lambda: done.append("removed"))
    with pytest.raises(ZeroDivisionError):
        saves.wait()
    saves.run(lambda: done.append("written"))
    saves.close()
    assert done == ["written"]


def test_links_and_loggers_that_need_the_file_at_once(tmp_path):
    logger = lightning(ROOT).loggers.CSVLogger(tmp_path)
    # As those of W&B and MLflow keep their argument.
    logger._log_model = "all"
    run = trainer(
        tmp_path,
        strategy(async_save=True),
        callbacks=[points(tmp_path, save_last="link")],
        logger=logger,
    )
    with pytest.raises(ConfigError, match=r"nothing to link to(?s:.*)CSVLogger, which reads each"):
        run.fit(task(), loader())


def test_a_checkpoint_io_that_decides_itself(tmp_path):
    io = lightning(ROOT).plugins.io.AsyncCheckpointIO()
    run = trainer(tmp_path, strategy(async_save=True), plugins=[io])
    with pytest.raises(ConfigError, match="a CheckpointIO of your own"):
        run.fit(task(), loader())
