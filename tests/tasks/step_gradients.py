"""Gradients of one optimizer step on eight rows, however they are split into batches.

As a script, `python step_gradients.py FOLDER`: the same in two processes, four rows in each.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from short_runs import make, trainer
from torch.utils.data import DataLoader, DistributedSampler

from lightning_peft.plugin.namespace import ROOTS
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.encoder_decoder import Seq2SeqLM
from lightning_peft.tasks.token_classification import TokenClassifier

LENGTHS = (2, 11, 3, 9, 12, 2, 7, 5)
SIZES = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 2}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, **SIZES,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, **SIZES,
}  # fmt: skip
TASKS: dict[str, tuple[type, dict[str, Any]]] = {
    "causal lm": (CausalLM, {"config": LLAMA}),
    "seq2seq": (Seq2SeqLM, {"config": T5, "generate_limit": 0}),
    "tagger": (
        TokenClassifier,
        {"config": {**LLAMA, "classifier_dropout": 0.0}, "labels": ["O", "B-X", "I-X"]},
    ),
}


def rows(kind: str) -> list[dict[str, Any]]:
    """Returns eight rows of twelve tokens with 2 to 12 labels each."""
    chance = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 64, (12,), generator=chance)
        labels = ids % 3 if kind == "tagger" else ids.clone()
        labels[length:] = -100
        row = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        made.append({**row, "words": length} if kind == "tagger" else row)
    return made


def step(
    kind: str,
    batch_size: int,
    accumulate: int,
    method: Any = "lora",
    given: Any = None,
    **options: Any,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Returns the gradients before the optimizer's step, and the logged training losses.

    Args:
        kind: A key of ``TASKS``.
        batch_size: Rows of a batch.
        accumulate: Batches of a step.
        method: ``"lora"``, ``"qlora"`` or a strategy.
        given: Arguments of the task.
        **options: Arguments of the Trainer.
    """
    found: dict[str, torch.Tensor] = {}
    losses: list[float] = []

    class Watch(import_module(ROOTS[1]).Callback):  # type: ignore[misc]
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            named = module.named_parameters()
            found.update({n: p.grad.clone() for n, p in named if p.grad is not None})

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train_loss"]))

    torch.manual_seed(5)
    cls, arguments = TASKS[kind]
    module = make(cls, "tiny", schedule="constant", **{**arguments, **(given or {})})
    data, sampler = rows(kind), None
    if options.get("devices", 1) > 1:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        sampler = DistributedSampler(data, options["devices"], rank, shuffle=False)
    callbacks = [Watch(), *options.pop("callbacks", ())]
    options = {"max_steps": 1, "callbacks": callbacks, **options}
    trainer(method, accumulate_grad_batches=accumulate, **options).fit(
        module, DataLoader(data, batch_size=batch_size, sampler=sampler)
    )
    return found, losses


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for kind in TASKS:
        found, losses = step(kind, 2, 2, devices=2)
        rank = torch.distributed.get_rank()
        torch.save({"gradients": found, "losses": losses}, folder / f"{kind}{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
