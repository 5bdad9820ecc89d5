"""``lightning-peft fit`` and its relatives as a user runs them: every recipe, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft.cli.recipes import recipe_files

RECIPES = [name for name in recipe_files() if not name.startswith("small/")]
ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
QUIET += ["--trainer.strategy.init_args.announce=false"]


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lightning_peft.cli", *words]
    cache = {"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, **cache},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    process = start(folder, *words)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def small(recipe: str) -> str:
    return f"--config=small/{recipe.rpartition('-')[0]}"


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def test_all_recipes_are_tested() -> None:
    tasks = ["image-classification", "sft", "time-series"]
    assert [f"{task}-{method}" for task in tasks for method in ("lora", "qlora")] == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_saves_and_validates(recipe, tmp_path) -> None:
    config = [f"--config={recipe}", small(recipe), *QUIET]
    code, _, err = run(tmp_path, "fit", *config)
    assert code == 0, err[-3000:]
    checkpoint = only(tmp_path, "best.ckpt")
    adapter = only(tmp_path, "best/adapter_config.json")
    assert json.loads(adapter.read_text())["r"] == 16
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert step > 0
    saved = yaml.safe_load(only(tmp_path, "config.yaml").read_text())
    assert saved["trainer"]["strategy"]["class_path"].endswith("LoRAStrategy")
    code, out, err = run(tmp_path, "validate", *config, f"--ckpt_path={checkpoint}")
    assert code == 0, err[-3000:]
    assert "val_loss" in out


SAVING = """
trainer:
  max_steps: 40
  limit_val_batches: 1
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 2}
"""


def test_interrupted_and_resumed_is_uninterrupted(tmp_path) -> None:
    (tmp_path / "saving.yaml").write_text(SAVING)
    config = ["--config=sft-lora", "--config=small/sft", "--config=saving.yaml", *QUIET]
    process = start(tmp_path, "fit", *config)
    while process.poll() is None and not list(tmp_path.rglob("epoch*.ckpt")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err[-3000:]
    checkpoint = only(tmp_path, "interrupted.ckpt")
    assert f"--ckpt_path {checkpoint.relative_to(tmp_path)}" in err
    assert 2 <= torch.load(checkpoint, weights_only=True)["global_step"] < 40
    for name, more in (("resumed", [f"--ckpt_path={checkpoint}"]), ("whole", [])):
        folder = f"--trainer.default_root_dir={tmp_path / name}"
        code, _, err = run(tmp_path, "fit", *config, folder, *more)
        assert code == 0, err[-3000:]
    ends = [
        torch.load(only(tmp_path / name, "epoch*.ckpt"), weights_only=True)["state_dict"]
        for name in ("resumed", "whole")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


WRONG = {
    "--model.init_args.learning_rat=1": "near names: learning_rate",
    "--trainr.max_steps=1": "near names: trainer.max_steps",
    "--data.init_args.data=nowhere.jsonl": "no file or folder 'nowhere.jsonl'",
    "--config=sft-qlorra": "Near names: sft-qlora",
}


@pytest.mark.parametrize("word", WRONG)
def test_bad_input_is_named_and_costs_nothing(word, tmp_path) -> None:
    code, out, err = run(tmp_path, "fit", "--config=sft-lora", "--config=small/sft", word)
    assert code == 2
    assert WRONG[word] in err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_wrong_key_in_a_file(tmp_path) -> None:
    (tmp_path / "own.yaml").write_text("trainer:\n  max_step: 3\n")
    code, _, err = run(tmp_path, "fit", "--config=sft-lora", "--config=own.yaml")
    assert code == 2
    assert "near names: trainer.max_steps" in err


def test_recipes_are_listed_shown_and_copied(tmp_path) -> None:
    code, out, _ = run(tmp_path, "recipes", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert list(rows) == list(recipe_files())
    assert rows["sft-qlora"]["method"] == "QLoRAStrategy"
    code, out, _ = run(tmp_path, "recipes", "show", "sft-qlora")
    assert code == 0
    assert out == recipe_files()["sft-qlora"].read_text()
    code, _, _ = run(tmp_path, "recipes", "copy", "small/sft", "mine.yaml")
    assert code == 0
    assert "package:" not in (tmp_path / "mine.yaml").read_text().partition("model:")[2]
    code, _, err = run(tmp_path, "recipes", "copy", "small/sft", "mine.yaml")
    assert code == 2
    assert "left alone" in err
    assert run(tmp_path, "recipes", "show", "sft-qlorra")[0] == 2


def test_the_defaults_of_recipes_are_models_of_the_hub() -> None:
    for name in RECIPES:
        content = yaml.safe_load(recipe_files()[name].read_text())
        model, given = content["model"]["init_args"], content["data"]["init_args"]
        if name.startswith("time-series"):
            # There is no hub for LightningModules.
            assert model["horizon"] == given["horizon"]
            continue
        assert model["model"].count("/") == 1
        (reads,) = (given[name] for name in ("tokenizer", "processor") if name in given)
        assert reads == model["model"]
