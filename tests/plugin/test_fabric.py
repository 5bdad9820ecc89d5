"""Fabric with ``inject``: saving and resuming, on one process and on two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fabric_run import build, train
from lightning.fabric import Fabric
from torch import nn

import lightning_peft
from lightning_peft.errors import BaseMismatchError, CheckpointError, ConfigError, LifecycleError

HERE = Path(__file__).parent


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("devices", [pytest.param(n, marks=pytest.mark.long) for n in (1, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, devices):
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    ran = subprocess.run(
        [sys.executable, str(HERE / "fabric_run.py"), str(tmp_path), str(devices)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(devices)]
    for rank in ranks:
        assert rank["rest"] == rank["whole"][3:]
        assert equal(rank["after"], rank["resumed"])
    if devices == 2:
        assert ranks[0]["whole"] != ranks[1]["whole"]
        trained = {k: v for k, v in ranks[0]["after"].items() if "lora_" in k}
        assert trained
        assert equal(trained, {k: ranks[1]["after"][k] for k in trained})


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def test_the_file_resumes_in_this_process_and_holds_no_base(fabric, tmp_path):
    torch.manual_seed(9)
    module, optimizer = fabric.setup(*build())
    whole = train(fabric, module, optimizer, 0, 6, tmp_path)
    content = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    assert all(v.numel() == 0 for k, v in content["state_dict"].items() if k == "0.weight")
    assert "1.running_mean" in content["state_dict"]
    assert (tmp_path / "adapters" / "middle" / "adapter_config.json").is_file()
    again, optimizer = fabric.setup(*build())
    saved = lightning_peft.load_fabric_checkpoint(
        fabric, tmp_path / "middle.ckpt", again, optimizer
    )
    assert saved == {"step": 2}
    assert train(fabric, again, optimizer, 3, 6) == whole[3:]
    assert equal(module.state_dict(), again.state_dict())


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_adapters_made_from_batches_come_from_the_file(init, fabric, tmp_path):
    def net():
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    draw = torch.Generator().manual_seed(1)
    data = [torch.randn(32, 6, generator=draw) for _ in range(40)]
    config = {"peft_type": "LORA", "init_lora_weights": init, "r": 2}
    config["target_modules"] = ["0", "2"]
    if init == "corda":
        config["corda_config"] = {"corda_method": "kpm"}
    module = net()
    lightning_peft.inject(module, config, batches=data)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    module, optimizer = fabric.setup(module, optimizer)
    whole = train(fabric, module, optimizer, 0, 6, tmp_path)
    path, again = tmp_path / "middle.ckpt", net()
    lightning_peft.load_fabric_checkpoint(fabric, path, again)
    again, optimizer = fabric.setup(again, torch.optim.AdamW(again.parameters(), lr=0.05))
    lightning_peft.load_fabric_checkpoint(fabric, path, again, optimizer)
    assert train(fabric, again, optimizer, 3, 6) == whole[3:]
    if init == "eva":
        return
    other = net()
    lightning_peft.inject(other, config, batches=[5 * x[:, [0, 0, 0, 0, 0, 1]] for x in data])
    with pytest.raises(BaseMismatchError, match="load it onto a new module"):
        lightning_peft.load_fabric_checkpoint(fabric, path, other)


def test_values_that_could_not_be_loaded_are_refused_before_anything_is_written(fabric, tmp_path):
    module, optimizer = build()
    path = tmp_path / "a.ckpt"
    odd = {"best": Path("b.ckpt"), "scores": [1.5, {"f1": np.ones(2)}], "step": 3}
    with pytest.raises(ConfigError, match=r"(?s)again without.*- best=.*- scores=\[1\.5") as info:
        lightning_peft.save_fabric_checkpoint(fabric, path, module, optimizer, **odd)
    assert "step" not in str(info.value)
    assert not list(tmp_path.iterdir())
    optimizer.param_groups[0]["lr"] = np.float64(0.5)
    plain = {"loss": np.float32(1.5), "by": {np.int64(2): (np.bool_(True),)}, "w": torch.ones(2)}
    lightning_peft.save_fabric_checkpoint(fabric, path, module, optimizer, **plain)
    found = lightning_peft.load_fabric_checkpoint(fabric, path, module, optimizer)
    assert torch.equal(found.pop("w"), torch.ones(2))
    assert found == {"loss": 1.5, "by": {2: (True,)}}
    assert type(optimizer.param_groups[0]["lr"]) is type(found["loss"]) is float
    optimizer.param_groups[0]["origin"] = Path("recipe")
    with pytest.raises(ConfigError, match="origin of optimizer 0="):
        lightning_peft.save_fabric_checkpoint(fabric, tmp_path / "b.ckpt", module, optimizer)
    assert not (tmp_path / "b.ckpt").exists()


def test_what_does_not_fit_is_refused(fabric, tmp_path):
    module, optimizer = build()
    path = tmp_path / "a.ckpt"
    lightning_peft.save_fabric_checkpoint(fabric, path, module, optimizer)
    with pytest.raises(CheckpointError, match="states of AdamW, and this run has SGD"):
        lightning_peft.load_fabric_checkpoint(
            fabric, path, module, torch.optim.SGD(module.parameters(), lr=1.0)
        )
    other = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with pytest.raises(LifecycleError, match="adapters"):
        lightning_peft.save_fabric_checkpoint(fabric, path, other)
    lightning_peft.inject(other, r=2)
    with pytest.raises(CheckpointError):
        lightning_peft.load_fabric_checkpoint(fabric, path, other)
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="was not written by save_fabric_checkpoint"):
        lightning_peft.load_fabric_checkpoint(fabric, tmp_path / "b.ckpt", module)
    with pytest.raises(ConfigError, match="a torch.nn.Module is meant"):
        lightning_peft.save_fabric_checkpoint(fabric, path, "module")
