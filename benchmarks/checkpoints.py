"""Adapter checkpoints against Lightning's full ones of the same module: time and size.

``python benchmarks/checkpoints.py [--repeats N] [--quick]`` builds two random Llamas with more than
100M parameters, trains one step of each with LoRA and one with full fine-tuning, and then saves the
checkpoints of the two in turn, through ``Trainer.save_checkpoint``, in one process. Times of saving
include getting the bytes to the disk (``fsync``). They are loaded as by a resumed run: each
time in a fresh process that has taken a step, through ``Trainer.strategy``, from the system's
cache, both with ``weights_only=True``. The record is ``benchmarks/records/checkpoints.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from record import QUIET, Way, conditions, interleaved, ratio, run_script, summary, write

# Width of the model, of its feed-forward layers, and layers.
SIZES = {"137M": (1024, 2816, 12), "379M": (2048, 5632, 8)}
MEASURES = ("save_seconds", "load_seconds", "bytes")


def trained(way: str, size: tuple[int, int, int], folder: Path) -> tuple[Any, Any]:
    """Returns a Trainer after one step, and its module."""
    import pytorch_lightning
    import torch
    from torch.utils.data import DataLoader

    from lightning_peft import LoRAStrategy
    from lightning_peft.tasks.causal_lm import CausalLM

    config = {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": size[0],
        "intermediate_size": size[1],
        "num_hidden_layers": size[2],
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    ids = torch.arange(16).view(2, 8)
    rows = [{"input_ids": row, "labels": row, "attention_mask": row * 0 + 1} for row in ids]
    trainer = pytorch_lightning.Trainer(
        strategy=LoRAStrategy(announce=False) if way == "adapter" else "auto",
        max_steps=1,
        accelerator="cpu",
        default_root_dir=folder,
        **QUIET,
    )
    task = CausalLM("random", config=config)
    trainer.fit(task, DataLoader(rows, batch_size=2))
    return trainer, task


def saved(trainer: Any, path: Path) -> Way:
    """Returns a function that saves and returns its seconds and bytes."""

    def run() -> Mapping[str, float]:
        started = time.perf_counter()
        trainer.save_checkpoint(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return {"save_seconds": time.perf_counter() - started, "bytes": path.stat().st_size}

    return run


def load(way: str, size: tuple[int, int, int], path: Path) -> None:
    """Loads in this process, and prints the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = trained(way, size, Path(folder))
    started = time.perf_counter()
    checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
    trainer.strategy.load_model_state_dict(checkpoint)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    print(json.dumps({"load_seconds": time.perf_counter() - started}))


def loaded(way: str, size: tuple[int, int, int], path: Path) -> Way:
    """Returns a function that loads in a fresh process."""
    words = ["--load", way, "--size", *map(str, size), "--file", str(path)]
    return lambda: run_script(__file__, *words)


def measured(size: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Returns the record of a size."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = {way: trained(way, size, folder) for way in ("adapter", "full")}
        files = {way: folder / f"{way}.ckpt" for way in made}
        runs = interleaved({way: saved(made[way][0], files[way]) for way in made}, repeats)
        parameters = sum(param.numel() for param in made["full"][1].parameters())
        del made
        loads = interleaved({way: loaded(way, size, files[way]) for way in files}, repeats)
    for way, turns in runs.items():
        for turn, other in zip(turns, loads[way], strict=True):
            turn |= other
    return {
        "parameters": parameters,
        "measured": summary(runs),
        "ratios": {measure: ratio(runs, "adapter", "full", measure) for measure in MEASURES},
        "runs": runs,
    }


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="once, to try the script")
    parser.add_argument("--check", action="store_true", help="a few times, for `all.py check`")
    parser.add_argument("--load", choices=["adapter", "full"], help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        load(given.load, tuple(given.size), given.file)
        return
    where = conditions()
    sizes, repeats = SIZES, given.repeats
    if given.quick or given.check:
        sizes, repeats = {"137M": (1024, 2816, 1 if given.quick else 4)}, 1 if given.quick else 3
    found = {name: measured(size, repeats) for name, size in sizes.items()}
    ratios = {
        f"{name}, {measure}": value
        for name, record in found.items()
        for measure, value in record["ratios"].items()
    }
    content = {"conditions": where, "repeats": repeats, "ratios": ratios, "sizes": found}
    write("checkpoints", content, quick=given.quick, check=given.check)


if __name__ == "__main__":
    main()
