"""What the tests of classifiers share: short runs on a CPU, on tiny models."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_peft.demo.run import BASE
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.plugin.strategies import LoRAStrategy, QLoRAStrategy

STRATEGIES = {"lora": LoRAStrategy, "qlora": QLoRAStrategy}
# An encoder with random weights for the demo's tokenizer.
ENCODER = {
    "model_type": "modernbert",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
}
MODELS = {
    "decoder": {"model": str(BASE), "dtype": "float32"},
    "encoder": {"model": "from a config", "config": ENCODER},
}


def trainer(method: str | None = None, root: str = ROOTS[1], **options: Any) -> Any:
    """Returns a Trainer for a few steps, with adapters if a method is named."""
    if method is not None:
        strategy = bind_to_lightning(STRATEGIES[method], root)
        options["strategy"] = strategy(r=4, announce=False, optimizer=None)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict.fromkeys(quiet, False) | options
    return import_module(root).Trainer(accelerator="cpu", devices=1, **options)


def make(cls: type, *arguments: Any, **options: Any) -> Any:
    """Returns a task or a data module for the Lightning of :func:`trainer`."""
    return bind_to_lightning(cls, ROOTS[1])(*arguments, **options)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    """Returns the names of parameters that are not what they were."""
    after = dict(module.named_parameters())
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


class Values:
    """Mixed into a callback: the parameters at the beginning of training."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


def values() -> Any:
    base = import_module(ROOTS[1]).Callback
    return type("ValuesAtTheBeginning", (Values, base), {})()
