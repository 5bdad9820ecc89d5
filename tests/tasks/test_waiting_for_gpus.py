"""No operation of a training step waits for the GPU, with all layers of LoRA and QLoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import fake_steps
import pytest
import torch
from fake_steps import steps

from lightning_peft.plan.sources import from_module, rows_of
from lightning_peft.runs.throughput import Throughput
from lightning_peft.tasks.token_loss import find_labels

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
    found = find_labels(batch)
    # The first token of a row is predicted by none.
    assert found["label_places"].tolist() == [1, 2, 4, 6]
    # The number of labels is not the number of rows, which planning may change.
    assert rows_of(found) == 2
    source = from_module(torch.nn.Linear(2, 2), found)
    assert source.batch(3, 4, True).keys() == batch.keys()
    assert find_labels([labels]) == [labels]
    with_rows = {"labels": torch.ones(2)}
    assert find_labels(with_rows) is with_rows


def test_tokens_are_counted_where_they_are() -> None:
    pace = Throughput()
    for masked in (1, 0):
        mask = torch.ones(2, 8, dtype=torch.long)
        mask[0, :masked] = 0
        pace.add({"input_ids": mask, "attention_mask": mask})
        pace.step(2 - masked)
    assert (pace.rows, pace.tokens) == (4, 31)
    assert pace.rates()["tokens"] > 0
