"""Script for torchrun: ``restarted_processes.py FOLDER``; out of memory with a sharded base."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from modules import rows, saver, strategy, task, trainer, weights
from torch import distributed
from torch.utils.data import DataLoader

ROOT = "lightning.pytorch"


def fit(folder, size, most=99, at=0, **given):
    """Trains from the newest checkpoint; the second process has no memory from a step on."""
    torch.manual_seed(7)
    module, seen, steps = task(ROOT, kind="llama"), [], []
    usual = module.training_step

    def limited(batch, batch_idx):
        seen.append(len(batch["ids"]))
        steps.append(module.global_step)
        if os.environ["RANK"] == "1" and seen[-1] > most and module.global_step >= at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return usual(batch, batch_idx)

    module.training_step = limited
    ours = strategy("qlora", ROOT, sharding="fsdp2", lora_dropout=0.3, **given)
    points = saver(ROOT, folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    given = {"max_epochs": 2, "accumulate_grad_batches": 8 // size}
    run = trainer(folder, ours, ROOT, devices=2, callbacks=[points], **given)
    data = DataLoader(rows("llama", 48), batch_size=size, shuffle=True)
    run.fit(module, data, ckpt_path=max(folder.glob("step=*.ckpt"), default=None))
    adapters = {name: t for name, t in weights(module).items() if "lora_" in name}
    return {"weights": adapters, "rows": seen, "steps": [*steps, run.global_step]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for at in (0, 4):
        file = folder / f"{at}-{os.environ['RANK']}.pt"
        if not file.exists():
            torch.save(fit(folder / f"at{at}", 4, 2, at, halve_batch_on_oom=True), file)
    torch.save(fit(folder / "smaller", 2), folder / f"smaller-{os.environ['RANK']}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
