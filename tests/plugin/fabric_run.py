"""Script of one or two processes: `python fabric_run.py FOLDER DEVICES`; it writes what it saw."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

import lightning_peft


def build():
    torch.manual_seed(4)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8)]
    module = nn.Sequential(*layers, nn.Linear(8, 3))
    lightning_peft.inject(module, r=2)
    return module, torch.optim.AdamW(module.parameters(), lr=0.05)


def train(fabric, module, optimizer, start, stop, folder=None):
    """Steps over rows that depend on the step and on the process; saves in the middle."""
    losses = []
    for step in range(start, stop):
        draw = torch.Generator().manual_seed(100 * step + fabric.global_rank)
        x, y = torch.randn(4, 6, generator=draw), torch.randint(3, (4,), generator=draw)
        loss = nn.functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        if folder is not None and step == 2:
            path = folder / "middle.ckpt"
            lightning_peft.save_fabric_checkpoint(fabric, path, module, optimizer, step=step)
    return losses


def main(folder: Path, devices: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    torch.manual_seed(9 + fabric.global_rank)
    module, optimizer = fabric.setup(*build())
    whole = train(fabric, module, optimizer, 0, 6, folder)
    after = {name: value.clone() for name, value in module.state_dict().items()}
    module, optimizer = fabric.setup(*build())
    saved = lightning_peft.load_fabric_checkpoint(fabric, folder / "middle.ckpt", module, optimizer)
    rest = train(fabric, module, optimizer, saved["step"] + 1, 6)
    seen = {"whole": whole, "rest": rest, "after": after, "resumed": module.state_dict()}
    torch.save(seen, folder / f"rank{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
