"""No operation of a training step waits for the GPU, with all layers of LoRA and QLoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import fake_steps
import pytest
import torch
from fake_steps import SIZES, steps
from models import tiny_llama, token_batch
from torch import Tensor

from lightning_peft.compat.torch import tree_leaves
from lightning_peft.runs.throughput import Throughput
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.token_loss import TokenLoss, label_places

# What a hook on the last norm does to its output, and what is said of it then.
WORDS = {
    "item": "_local_scalar_dense",
    "tolist": "_local_scalar_dense",
    "truth": "_local_scalar_dense",
    "nonzero": "nonzero",
    "boolean index": "nonzero",
}


def test_no_step_needs_a_number() -> None:
    found = steps(torch.device("cpu"), [(False, False, 0.0), (True, True, 0.1)], ["truth"])
    assert WORDS["truth"] in found.pop("truth")
    # By the 16 labels that the host counted.
    assert list(found.values()) == [["cpu", 8]] * 2


@pytest.mark.long
def test_no_step_waits_for_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, fake_steps.__file__],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, words in {**WORDS, "cpu": "_to_copy.default copies"}.items():
        assert words in found.pop(name)
    assert list(found.values()) == [["fakegpu:0", 8]] * 8


def test_the_host_finds_the_labels_of_a_batch() -> None:
    labels = torch.tensor([[5, -100, 6, 7], [-100, 8, -100, 9]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": labels}
    # The first token of a row is predicted by none.
    assert label_places(batch).tolist() == [1, 2, 4, 6]
    assert label_places([labels]) is None
    assert label_places({"labels": torch.ones(2)}) is None
    assert label_places({"labels": labels.to("meta")}) is None


def test_a_moved_batch_has_what_it_had() -> None:
    task = CausalLM("random", config={"model_type": "llama", **SIZES})
    for batch in (token_batch(), list(token_batch().values())):
        moved = task.transfer_batch_to_device(batch, torch.device("meta"), 0)
        assert type(moved) is type(batch)
        assert len(moved) == len(batch)
        assert all(value.device.type == "meta" for value in tree_leaves(moved))
    moved = task.transfer_batch_to_device(token_batch(), torch.device("meta"), 0)
    assert moved.keys() == token_batch().keys()
    assert task.token_loss._places_of(moved["labels"]).device.type == "meta"
    assert task.token_loss._places_of(moved["labels"].clone()) is None


def masked(labels: Tensor) -> Tensor:
    return labels.masked_fill_(torch.arange(labels.shape[1]) % 3 == 0, -100)


def cut(labels: Tensor) -> Tensor:
    labels.data = labels.data[:, :5]
    return labels


@pytest.mark.parametrize(
    "change",
    [masked, lambda labels: masked(labels.clone()), lambda labels: labels[:, :5], cut],
    ids=["in place", "copied", "truncated", "truncated in place"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_labels_that_change_after_the_transfer_are_looked_for_again(change, inference) -> None:
    model, losses = tiny_llama(), TokenLoss()
    with torch.inference_mode(inference):
        batch = token_batch()
        losses.keep_places(batch["labels"], label_places(batch))
        labels = change(batch["labels"])
        batch = {
            name: batch[name][:, : labels.shape[1]] for name in ("input_ids", "attention_mask")
        }
        batch["labels"] = labels
        scored = losses.evaluate(model, model, batch)
        torch.testing.assert_close(scored.loss, model(**batch).loss)
    assert scored.tokens == (labels[:, 1:] != -100).sum()


def test_tokens_are_counted_where_they_are() -> None:
    pace = Throughput()
    for masked in (1, 0):
        mask = torch.ones(2, 8, dtype=torch.long)
        mask[0, :masked] = 0
        pace.add({"input_ids": mask, "attention_mask": mask})
        pace.step(2 - masked)
    assert (pace.rows, pace.tokens) == (4, 31)
    assert pace.rates()["tokens"] > 0
