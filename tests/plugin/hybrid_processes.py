"""Script of four processes of which two share a base: `python hybrid_processes.py FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from modules import loader, strategy, trainer
from torch import distributed
from two_sharded_processes import ROOT, Loaded, fit, local_bytes, trained

from lightning_peft.engine.loading import quantized_cache
from lightning_peft.errors import LightningPeftError

COUNT = 4
WAYS = {
    "whole": {"sharding": None},
    "four": {},
    "two": {"dp_shard_size": 2},
    "two, offload": {"dp_shard_size": 2, "offload": True},
    "three": {"dp_shard_size": 3},
}


def cached(folder):
    """Writes codes of which two processes have all, and loads them whole."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    quantized_cache.SMALLEST = 1
    seen = {}
    for name in ("two", "whole"):
        module = Loaded(str(folder / "base"), torch.float32)
        torch.manual_seed(7)
        given = {"sharding": "fsdp2", **WAYS[name]}
        run = trainer(folder / "root", strategy("qlora", ROOT, **given), ROOT, devices=COUNT)
        run.fit(module, loader("llama"))
        seen[name] = {**trained(module), "on load": module.on_load}
    return seen


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    seen = {}
    for method in ("qlora", "lora"):
        for name, given in WAYS.items():
            try:
                ours = {"verify": "full", **given}
                sharding = ours.pop("sharding", "fsdp2")
                run, module = fit(folder, COUNT, "llama", method, sharding, ours=ours)
            except LightningPeftError as error:
                seen[f"{method} {name}"] = str(error)
                continue
            run.save_checkpoint(folder / f"{method} {name}.ckpt")
            seen[f"{method} {name}"] = {**trained(module), "bytes": local_bytes(module)}
    for name in ("whole", "two"):
        # Each goes on from the other's.
        path = folder / f"qlora {'two' if name == 'whole' else 'whole'}.ckpt"
        ours = dict(WAYS[name])
        sharding = ours.pop("sharding", "fsdp2")
        _, module = fit(
            *(folder, COUNT, "llama", "qlora", sharding), ours=ours, ckpt_path=path, max_epochs=2
        )
        seen[f"resumed {name}"] = trained(module)
    seen["cached"] = cached(folder)
    torch.save(seen, folder / f"rank{distributed.get_rank()}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
