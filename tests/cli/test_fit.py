"""``lightning-peft fit`` interrupted, stopped, killed, resumed, and in two processes."""

import json
import signal
import time

import pytest
import torch
from program import wait
from trials import QUIET, small

from lightning_peft.runs.folder import RunFolder

SAVING = """
trainer:
  limit_train_batches: 16
  limit_val_batches: 1
  callbacks:
    - class_path: lightning_peft.tasks.BestCheckpoint
      init_args: {save_every: 2}
"""


def test_interrupted_and_resumed_is_uninterrupted(program, tmp_path):
    (tmp_path / "saving.yaml").write_text(SAVING)
    config = ["--config=sft-lora", "--config=small/sft", "--config=saving.yaml", *QUIET]
    process = program.start(tmp_path, "fit", *config, "--run_dir=mine")
    wait(process, (tmp_path / "mine" / "checkpoints" / "last.ckpt").exists)
    assert RunFolder(tmp_path / "mine").status.state == "running"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err[-3000:]
    (checkpoint,) = tmp_path.rglob("interrupted.ckpt")
    assert "lightning-peft fit --resume mine" in err
    assert 2 <= torch.load(checkpoint, weights_only=True)["global_step"] < 16
    assert RunFolder(tmp_path / "mine").status.state == "stopped"
    program.succeed(tmp_path, "fit", "--resume", "mine", *QUIET, fresh=True)
    program.succeed(tmp_path, "fit", *config, "--run_dir=whole")
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("mine", "whole")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    # The record goes on where it was: every step is there, with the same loss.
    losses = [
        {
            row["step"]: row["train_loss"]
            for row in folder.rows(folder.metrics)
            if "train_loss" in row
        }
        for folder in (RunFolder(tmp_path / name) for name in ("mine", "whole"))
    ]
    assert losses[0] == losses[1]
    assert list(losses[0]) == list(range(1, 17))
    results = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("mine", "whole")
    ]
    assert results[0]["after"] == results[1]["after"]
    assert results[0]["before"] == results[1]["before"] != {}


def test_another_program_saves_and_stops_a_run(program, tmp_path):
    (tmp_path / "saving.yaml").write_text(SAVING)
    config = ["--config=sft-lora", "--config=small/sft", "--config=saving.yaml", *QUIET]
    process = program.start(tmp_path, "fit", *config, "--run_dir=mine")
    folder = RunFolder(tmp_path / "mine")
    for wish, file in (("save_now", "saved.ckpt"), ("stop", "interrupted.ckpt")):
        wait(process, lambda: folder.status and folder.status.step > 1)
        folder.write(folder.control, {wish: True})
        wait(process, (folder.checkpoints / file).exists)
        assert (folder.checkpoints / file).exists(), process.communicate()[1][-3000:]
    process.communicate()
    assert process.returncode == 130
    assert folder.status.state == "stopped"


def test_a_second_interrupt_stops_at_once(program, tmp_path):
    # One step takes the whole epoch, so that the first interrupt is still waiting for its end.
    long = ["--trainer.limit_train_batches=300", "--trainer.accumulate_grad_batches=300"]
    process = program.start(
        tmp_path, "fit", "--config=sft-lora", small("sft-lora"), *QUIET, *long, "--run_dir=mine"
    )
    folder = RunFolder(tmp_path / "mine")
    wait(process, lambda: folder.status and folder.status.state == "running")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err[-3000:]
    assert "Press Ctrl-C again to stop at once" in err
    assert folder.status.state == "stopped"
    assert folder.newest_checkpoint() is None


@pytest.mark.long
def test_two_processes_keep_one_record(program, tmp_path):
    devices = [
        "--trainer.devices=2",
        "--trainer.accelerator=cpu",
        "--trainer.limit_train_batches=4",
        "--trainer.val_check_interval=1.0",  # wins over the budget, also where it is the default
    ]
    config = ["--config=sft-lora", "--config=small/sft", *QUIET, *devices]
    out = program.succeed(tmp_path, "fit", *config, "--json", fresh=True)
    result = json.loads(out)
    assert (result["devices"], result["steps"]) == (2, 4)
    (path,) = (tmp_path / "runs").iterdir()
    folder = RunFolder(path)
    steps = [row["step"] for row in folder.rows(folder.metrics) if "train_loss" in row]
    assert steps == [1, 2, 3, 4]
    assert folder.status.state == "finished"
    assert len(list(folder.rows(folder.samples))) == 6
    assert result["after"]["val_loss"] < result["before"]["val_loss"]


def test_a_killed_run_is_found_out(program, tmp_path):
    config = ["--config=sft-lora", "--config=small/sft", *QUIET]
    process = program.start(tmp_path, "fit", *config, "--run_dir=mine")
    folder = RunFolder(tmp_path / "mine")
    wait(process, lambda: folder.status)
    assert folder.status.state == "preparing"
    process.kill()
    process.communicate()
    assert folder.status.state == "crashed"
