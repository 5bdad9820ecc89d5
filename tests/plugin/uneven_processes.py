"""Mistakes of others on several devices, each in two processes: `uneven_processes.py FOLDER`."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from modules import lightning, rows, strategy, task, trainer
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset

ROOT = "lightning.pytorch"
UNEQUAL, APART = "has begun batch 3 of the fit", "the processes no longer train one model"

# The process that ends by its own error, if one does; sharding; what the others say.
CASES: dict[str, tuple[int | None, str | None, str]] = {
    "raises": (1, None, "Process 1 has ended by ValueError: a row is wrong."),
    "raises_first": (0, "fsdp2", "Process 0 has ended by ValueError: a row is wrong."),
    "skips": (1, "fsdp2", "Process 1 has ended by RuntimeError: Skipping the `training_step`"),
    "stops": (None, None, UNEQUAL),
    "streams": (None, "fsdp2", UNEQUAL),
    "saves": (None, "fsdp2", "in 'save_checkpoint' at batch 2"),
    "waits": (None, None, "in 'barrier' at batch 2"),
    "logs": (0, None, "waits for all processes in 'reduce'"),
    "validates": (None, None, "waits in 'val_dataloader()' there"),
    "schedules": (None, None, APART),
    "out_of_memory": (1, None, "Process 1 has ended by LifecycleError: Out of memory"),
    # It waits in its own exchange, where only the end of the process helps.
    "exchanges": (0, None, "exchanges something by torch.distributed"),
}


class Stream(IterableDataset):
    """More rows in the second process."""

    def __iter__(self) -> Any:
        return iter(rows("residuals", 8 + 4 * own_rank()))


def own_rank() -> int:
    return distributed.get_rank()


def fit(folder: Path, name: str) -> str:
    """Trains with a mistake; returns the error."""
    torch.manual_seed(5)
    module, given = task(ROOT, kind="residuals"), {}
    usual, victim = module.training_step, CASES[name][0]
    short = name in ("out_of_memory", "exchanges")

    def step(batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and own_rank() == victim:
            if name == "skips":
                return None
            if name.startswith("raises"):
                raise ValueError("a row is wrong")
        if name == "exchanges":
            if own_rank() == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            distributed.all_reduce(torch.ones(1))
        loss = usual(batch, batch_idx)
        if name == "logs" and own_rank() == 0:
            module.log("loss", loss, sync_dist=True)
        return loss

    def end(*_: Any) -> None:
        first = own_rank() == 0 and module.trainer.global_step == 2
        if first and name == "stops":
            module.trainer.should_stop = True
        if first and name == "saves":
            module.trainer.save_checkpoint(folder / "only.ckpt")
        if first and name == "waits":
            module.trainer.strategy.barrier()
        if own_rank() == victim and name == "out_of_memory":
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def plateau() -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"},
        }

    module.training_step, module.on_train_batch_end = step, end
    data: Any = DataLoader(rows("residuals", 24), batch_size=4)
    if name == "streams":
        data = DataLoader(Stream(), batch_size=4)
    if name == "schedules":
        module.configure_optimizers, given = plateau, {"max_epochs": 4}
        module.validation_step = lambda batch, batch_idx: module.log(
            "val_loss", float(-own_rank() * module.current_epoch)
        )
    ours = strategy(
        "lora",
        ROOT,
        target_modules=["up", "down"],
        sharding=CASES[name][1],
        halve_batch_on_oom=short,
    )
    try:
        run = trainer(folder, ours, ROOT, devices=2, **given)
        run.fit(module, data, None if name == "validates" and run.global_rank == 1 else data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def run(folder: Path, name: str) -> None:
    """Forks two processes, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            place |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({k: str(v) for k, v in place.items()}, TORCHELASTIC_RUN_ID="none")
            lightning(ROOT)
            torch.save(fit(folder / name, name), folder / f"{name}{rank}.pt")
            os._exit(0)
        children.append(child)
    for rank, child in enumerate(children):
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            torch.save(f"exit {status}", folder / f"{name}{rank}.pt")


if __name__ == "__main__":
    for case in sys.argv[2:] or CASES:
        run(Path(sys.argv[1]), case)
