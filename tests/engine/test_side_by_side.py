"""What ``inject`` makes is what ``peft.get_peft_model`` makes, or is refused.

Each row compares adapted layers, trained tensors with their dtypes and first values, outputs, three
steps of an optimizer, files both ways, and merges.
"""

from __future__ import annotations

import pytest

from .lora_rows import lora_rows, model_rows
from .method_rows import method_rows
from .side_by_side import outcome

ROWS = {row.name: row for row in (*lora_rows(), *model_rows(), *method_rows())}
# One row for each mechanism.
SLICE = (
    "lora on linear: bias all",
    "lora on linear: bias lora_only",
    "lora on linear: dropout",
    "lora on linear: orthogonal",
    "lora on linear: dora",
    "lora on linear: saved head",
    "lora on linear: ranks",
    "lora on linear: olora",
    "lora on linear: Gaussian",
    "lora on linear: inference",
    "lora on linear: tying",
    "lora on linear: own class",
    "lora on torch.float16: lora_bias",
    "lora on Conv1D: rslora",
    "lora on Conv1d: plain",
    "lora on Conv2d: plain",
    "lora on Conv2d of 1: plain",
    "lora on Conv3d: rslora",
    "lora on Conv3d of 1: dora",
    "lora on grouped Conv1d: groups",
    "lora on grouped Conv2d: dora",
    "lora on Embedding: dora",
    "lora on Embedding: plain",
    "lora on scaled Embedding: plain",
    "lora on tied llama: embedding",
    "lora on gpt2: embedding",
    "lora on gpt2: plain",
    "lora on llama: rslora",
    "lora on llama: ranks",
    "lora on llama: first block",
    "lora on llama: expression",
    "lora on llama: head",
    "lora on llama: pissa",
    "lora on attention True, False: plain",
    "lora on bert: task",
    "IA3 on linear: all feedforward",
    "IA3 on torch.bfloat16: keys",
    "IA3 on llama: plain",
    "LoHa on llama: plain",
    "LoHa on Conv2d: effective",
    "LoKr on llama: plain",
    "HRA on llama: plain",
    "OFT on linear: block",
    "LoKr on Conv1D: plain",
    "OFT on Conv2d: block",
    "MiSS on linear: bat",
    "BOFT on linear: blocks of 4",
    "C3A on linear: 8",
    "FourierFT on linear: patterns",
    "LNTuning on linear: saved",
    "ShiRA on square: no seed",
    "VeRA on linear: saved",
    "TinyLoRA ",
    "tokens on words",
)


def test_the_table_is_wide() -> None:
    assert len(ROWS) >= 600
    assert len({row.name.split(" on ")[0] for row in ROWS.values()}) >= 30
    assert ROWS.keys() >= set(SLICE)


@pytest.mark.parametrize(
    "name", [n if n in SLICE else pytest.param(n, marks=pytest.mark.long) for n in ROWS]
)
def test_every_row(name: str, tmp_path) -> None:
    assert outcome(ROWS[name], tmp_path) == []
