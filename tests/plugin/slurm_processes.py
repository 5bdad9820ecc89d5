"""Two tasks of a SLURM job that is requeued by SIGUSR1: `slurm_processes.py FOLDER COUNT`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from modules import rows, strategy, task, trainer, weights
from torch.utils.data import DataLoader

ROOT = "lightning.pytorch"
JOB = {"JOB_ID": "4242", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
JOB |= {"NNODES": "1", "NODELIST": "127.0.0.1", "NODEID": "0"}
# Of other launchers.
OTHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE")


def become_task(folder: Path) -> None:
    """Exchanges the variables of a launcher for those of ``srun``, and ``scontrol`` for a file."""
    rank = os.environ.get("LOCAL_RANK") or os.environ["RANK"]
    for name in [n for n in os.environ if n in OTHERS or n.startswith("TORCHELASTIC")]:
        del os.environ[name]
    os.environ.update({f"SLURM_{name}": value for name, value in JOB.items()})
    os.environ.update(SLURM_PROCID=rank, SLURM_LOCALID=rank)
    program = folder / f"bin{rank}" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
    program.chmod(0o755)
    os.environ["PATH"] = f"{program.parent}:{os.environ['PATH']}"


def fit(folder: Path, sharding: str | None, notice: int | None = None) -> Any:
    """Trains an epoch of ten steps, with a signal in the batch ``notice``."""
    torch.manual_seed(5)
    module = task(ROOT, kind="residuals")
    usual = module.training_step

    def step(batch: Any, batch_idx: int) -> Any:
        if batch_idx == notice:
            os.kill(os.getpid(), signal.SIGUSR1)
        return usual(batch, batch_idx)

    module.training_step = step
    ours = strategy("lora", ROOT, target_modules=["up", "down"], sharding=sharding)
    run = trainer(folder, ours, ROOT, devices=2)
    run.fit(module, DataLoader(rows("residuals", 80), batch_size=4, shuffle=True))
    return run, module


def adapters(module: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(module).items() if "lora_" in name}


def main(folder: Path) -> None:
    """Compares a requeued run with one that was left alone."""
    become_task(folder)
    found = {}
    for sharding in (None, "fsdp2"):
        place = folder / str(sharding)
        fit(place, sharding, notice=2)
        saved = sorted(file.name for file in place.glob("*.ckpt"))
        run, module = fit(place, sharding)
        _, alone = fit(place / "alone", sharding)
        found[sharding] = {
            "saved": saved,
            "losses": (module.losses, alone.losses),
            "weights": (adapters(module), adapters(alone)),
        }
    torch.save(found, folder / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
