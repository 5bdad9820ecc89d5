"""QLoRA on a real GGUF file by the commands: interrupted, resumed, proven, reproduced, compared."""

import hashlib
import json
import signal
from pathlib import Path

import pytest
import torch
from program import wait

from lightning_peft.demo.exercises import absence_of_smollm2, smollm2
from lightning_peft.demo.orders import order_rows
from lightning_peft.runs.folder import RunFolder

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        absence_of_smollm2() is not None, reason=f"needs {absence_of_smollm2() or 'nothing'}"
    ),
]
STEPS = 4
SHORT = """
model:
  init_args: {model: "MODEL", dtype: bfloat16, learning_rate: 0.001}
data:
  init_args: {data: rows.jsonl, tokenizer: "MODEL", batch_size: 2, max_length: 256}
trainer:
  max_epochs: 1
  accumulate_grad_batches: 1
  limit_train_batches: STEPS
  limit_val_batches: 1
  num_sanity_val_steps: 1
  val_check_interval: null
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_peft.tasks.BestCheckpoint
      init_args: {save_every: 1}
"""
CONFIG = ("--config=sft-qlora", "--config=short.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, program):
    """A folder with the run ``runs/whole`` on the file, and what it was trained with."""
    folder = tmp_path_factory.mktemp("gguf")
    rows = [
        {**row, "split": "validation" if place < 4 else "train"}
        for place, row in enumerate(order_rows(2 * STEPS + 8, 31))
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    short = SHORT.replace("MODEL", str(smollm2())).replace("STEPS", str(STEPS))
    (folder / "short.yaml").write_text(short)
    program.succeed(folder, "fit", *CONFIG, "--run_dir=runs/whole")
    return folder


def test_an_interrupted_run_ends_as_the_whole_one(folder, program):
    process = program.start(folder, "fit", *CONFIG, "--run_dir=runs/mine")
    mine = RunFolder(folder / "runs" / "mine")
    wait(process, (mine.checkpoints / "last.ckpt").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err[-3000:]
    saved = torch.load(mine.checkpoints / "interrupted.ckpt", weights_only=True)
    assert 1 <= saved["global_step"] < STEPS
    program.succeed(folder, "fit", "--resume", "runs/mine")
    ends = [
        torch.load(folder / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("mine", "whole")
    ]
    assert ends[0]["global_step"] == STEPS
    found, wanted = (end["state_dict"] for end in ends)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_it_is_proven_and_reproduced(folder, program):
    out = program.succeed(folder, "verify", "runs/whole", "--json")
    checks = {check["name"]: check["passed"] for check in json.loads(out)["checks"]}
    assert checks["the base is the one that was trained on"] is True
    assert False not in checks.values()
    out = program.succeed(folder, "reproduce", "runs/whole", "--json")
    again = json.loads(out)
    assert again["identical"]
    assert again["steps"] == STEPS
    facts = json.loads((folder / "runs" / "whole" / "provenance.json").read_text())
    content = Path(str(smollm2())).read_bytes()
    assert facts["base"]["model"]["gguf_sha256"] == hashlib.sha256(content).hexdigest()


def test_it_is_compared_with_its_base(folder, program):
    words = ("--data", "rows.jsonl", "--batch-size", "4", "--json")
    out = program.succeed(folder, "compare", "tuned=runs/whole", *words)
    base, tuned = json.loads(out)["scores"]
    assert (base["name"], tuned["name"]) == ("base", "tuned")
    assert tuned["loss"] < 0.8 * base["loss"]
    out = program.succeed(
        folder, "chat", "runs/whole", "--prompt", "Hi, need two mugs", "--max-new-tokens", "8"
    )
    assert out.strip()
