"""Script: AdaLoRA and averages of weights with a sharded base and with a whole one each.

``python sharded_training.py FOLDER 2`` trains in two processes, and again from the sixth step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from modules import differing, lightning, saver, weights
from torch import distributed
from two_sharded_processes import ROOT, fit

RANKS = {"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 2}
ADALORA = {"r": 16, "peft_config": {**RANKS, "target_modules": ["q_proj", "v_proj"]}}
# Averages by Lightning, with arguments; the others resume too.
CASES = {
    "adalora": (None, {}),
    "EMAWeightAveraging": ("EMAWeightAveraging", {"decay": 0.75}),
    "swa": ("StochasticWeightAveraging", {"swa_lrs": 0.01, "swa_epoch_start": 1}),
}


def adapters(folder, count, case, sharding, checkpoint=None):
    average, given = CASES[case]
    callbacks = lightning(ROOT).callbacks
    used = [] if average is None else [getattr(callbacks, average)(**given)]
    if checkpoint is None:
        points = {"filename": "{step}", "every_n_train_steps": 6, "save_top_k": -1}
        used.append(saver(ROOT, folder / f"{case} {sharding}", **points))
    given = {"ours": ADALORA if average is None else {}, "accumulate_grad_batches": 1}
    _, module = fit(
        folder, count, "llama", "qlora", sharding, checkpoint,
        callbacks=used, max_epochs=3, **given,
    )  # fmt: skip
    return {name: value for name, value in weights(module).items() if "lora_" in name}


def main(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    seen = {}
    for case in CASES:
        expected = adapters(folder, count, case, None)
        seen[case] = differing(adapters(folder, count, case, "fsdp2"), expected)
        if case != "swa":
            file = folder / f"{case} fsdp2" / "step=6.ckpt"
            again = adapters(folder, count, case, "fsdp2", file)
            seen[f"{case} resumed"] = differing(again, expected)
    torch.save(seen, folder / f"rank{distributed.get_rank()}.pt")
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
