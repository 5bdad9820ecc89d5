"""Finished runs, trained once per session: what tests of merging, exporting and chatting need.

The fixtures are imported by `conftest.py`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import warnings
from pathlib import Path

import pytest
from trainer_fixtures import QUIET

ROOT = Path(__file__).parents[1]
BASE = ROOT / "lightning_peft" / "demo" / "base"
EXAMPLES = ROOT / "lightning_peft" / "demo" / "instructions.jsonl"


def train(folder: Path, method: str, steps: int = 6) -> Path:
    """Trains a few steps on the shipped base, and returns the folder of the run."""
    import pytorch_lightning as pl
    import torch

    from lightning_peft.data.supervised import SupervisedData
    from lightning_peft.demo.run import TEMPLATE
    from lightning_peft.plugin.namespace import bind_to_lightning
    from lightning_peft.plugin.strategies import LoRAStrategy, QLoRAStrategy
    from lightning_peft.tasks.causal_lm import CausalLM

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cls = bind_to_lightning(
        {"qlora": QLoRAStrategy, "lora": LoRAStrategy}[method], "pytorch_lightning"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.seed_everything(3, verbose=False)
        # A fixture of the session is made outside of what puts the environment back, and later
        # tests would seed their processes by it.
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name, None)
        checkpoint = pl.callbacks.ModelCheckpoint(folder / "checkpoints", filename="last-{step}")
        trainer = pl.Trainer(
            strategy=cls(r=8, announce=False),
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            callbacks=[checkpoint],
            **QUIET,
            default_root_dir=folder,
        )
        data = bind_to_lightning(SupervisedData, "pytorch_lightning")(
            str(EXAMPLES),
            str(BASE),
            chat_template="{{ bos_token }}" + TEMPLATE,
            batch_size=4,
            limit=40,
            cache_dir=str(folder / "cache"),
        )
        task = bind_to_lightning(CausalLM, "pytorch_lightning")
        # A rate at which a few steps change what the model says.
        module = task(str(BASE), learning_rate=1e-2, dtype="float32")
        trainer.fit(module, data.loader("train"))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="session")
def qlora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a QLoRA run, with one checkpoint and its adapter."""
    return train(tmp_path_factory.mktemp("qlora-run"), "qlora")


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run."""
    return train(tmp_path_factory.mktemp("lora-run"), "lora")


def adapter_in(run: Path) -> Path:
    """Returns the adapter folder of a run."""
    (folder,) = (run / "checkpoints" / "adapters").iterdir()
    return folder


def json_of(done: subprocess.CompletedProcess[str]) -> dict:
    """Returns the JSON on the standard output of a command that succeeded."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
