"""``lightning-peft fit`` and its relatives as a user runs them: every recipe, in real processes."""

from __future__ import annotations

import hashlib
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
from lightning_peft.runs.folder import RunFolder

RECIPES = [name for name in recipe_files() if not name.startswith("small/") and name != "forkme"]
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
    task = "sft" if recipe == "forkme" else recipe.rpartition("-")[0]
    return f"--config=small/{task}"


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def run_folder(folder: Path, kind: str = "") -> RunFolder:
    (found,) = [path for path in (folder / "runs").iterdir() if f"-{kind}" in path.name]
    return RunFolder(found)


def test_all_recipes_are_tested() -> None:
    tasks = (
        "dpo",
        "image-classification",
        "orpo",
        "reward",
        "sft",
        "speech-recognition",
        "summarization",
        "text-classification",
        "time-series",
        "token-classification",
        "translation",
    )
    assert [f"{task}-{method}" for task in tasks for method in ("lora", "qlora")] == RECIPES


@pytest.mark.parametrize("recipe", [*RECIPES, "forkme"])
def test_a_recipe_trains_and_leaves_a_whole_run_folder(recipe, tmp_path) -> None:
    code, out, err = run(tmp_path, "fit", f"--config={recipe}", small(recipe), *QUIET, "--json")
    assert code == 0, err[-3000:]
    result = json.loads(out)
    folder = RunFolder(tmp_path / result["folder"])
    assert folder.path.parent == tmp_path / "runs"
    assert folder.path.name == result["run"]
    assert recipe in folder.path.name
    assert folder.status.state == "finished"
    assert folder.status.step == folder.status.total_steps == result["steps"] > 0
    assert result["method"] == ("lora" if recipe.endswith("-lora") else "qlora")
    assert result["after"].keys() == result["before"].keys() >= {"val_loss"}
    assert result["after"]["val_loss"] < result["before"]["val_loss"]
    rows = list(folder.rows(folder.metrics))
    steps = [row["step"] for row in rows if "train_loss" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == result["steps"]
    # The adapter of the best checkpoint says what it is made of.
    adapter = folder.checkpoints / "adapters" / "best"
    facts = json.loads((adapter / "provenance.json").read_text())
    provenance = json.loads(folder.provenance.read_text())
    assert facts["run"] == result["run"]
    assert facts["recipe_sha256"] == provenance["recipe_sha256"] == result["recipe_sha256"]
    assert facts["data"] == provenance["data"] is not None
    assert facts["metrics"] == {"before": result["before"], "after": result["after"]}
    recipe_text = folder.recipe.read_text()
    assert hashlib.sha256(recipe_text.encode()).hexdigest() == result["recipe_sha256"]
    content = yaml.safe_load(recipe_text)
    assert content["trainer"]["strategy"]["class_path"].endswith("LoRAStrategy")
    assert "ckpt_path" not in content
    if "LogSamples" in recipe_text:
        samples = list(folder.rows(folder.samples))
        assert {row["step"] for row in samples} == {0, result["steps"]}
        assert all(row["prompt"] and row["expected"] for row in samples)


def test_a_checkpoint_is_evaluated_and_predicts(tmp_path) -> None:
    """The recipe that a run leaves is a config like any other."""
    code, _, err = run(tmp_path, "fit", "--config=sft-lora", small("sft-lora"), *QUIET)
    assert code == 0, err[-3000:]
    trained = run_folder(tmp_path)
    again = [f"--config={trained.recipe}", f"--ckpt_path={trained.checkpoints / 'best.ckpt'}"]
    code, out, err = run(tmp_path, "validate", *again, *QUIET, "--json")
    assert code == 0, err[-3000:]
    after = json.loads(trained.result.read_text())["after"]
    assert json.loads(out)["after"] == pytest.approx(after)
    assert "lightning_peft" in (folder := run_folder(tmp_path, "validate")).recipe.read_text()
    assert folder.status.kind == "validate"
    assert folder.status.state == "finished"
    more = ["--trainer.limit_predict_batches=2", "--data.batch_size=3"]
    code, out, err = run(tmp_path, "predict", *again, *QUIET, *more)
    assert code == 0, err[-3000:]
    folder = run_folder(tmp_path, "predict")
    predictions = list(folder.rows(folder.predictions))
    assert len(predictions) == 6
    assert all(row["generated"] != row["prompt"] for row in predictions)
    assert str(folder.predictions.relative_to(tmp_path)) in out


SAVING = """
trainer:
  limit_train_batches: 40
  limit_val_batches: 1
  callbacks:
    - class_path: lightning_peft.tasks.BestCheckpoint
      init_args: {save_every: 2}
"""


def test_interrupted_and_resumed_is_uninterrupted(tmp_path) -> None:
    (tmp_path / "saving.yaml").write_text(SAVING)
    config = ["--config=sft-lora", "--config=small/sft", "--config=saving.yaml", *QUIET]
    process = start(tmp_path, "fit", *config, "--run_dir=mine")
    while process.poll() is None and not list(tmp_path.rglob("last.ckpt")):
        time.sleep(0.02)
    assert RunFolder(tmp_path / "mine").status.state == "running"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err[-3000:]
    checkpoint = only(tmp_path, "interrupted.ckpt")
    assert "lightning-peft fit --resume mine" in err
    assert 2 <= torch.load(checkpoint, weights_only=True)["global_step"] < 40
    assert RunFolder(tmp_path / "mine").status.state == "stopped"
    code, _, err = run(tmp_path, "fit", "--resume", "mine", *QUIET)
    assert code == 0, err[-3000:]
    code, _, err = run(tmp_path, "fit", *config, "--run_dir=whole")
    assert code == 0, err[-3000:]
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("mine", "whole")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    # The record goes on where it was: every step is there, with the same loss.
    losses = [
        {
            row["step"]: row["train_loss"]
            for row in folder.rows(folder.metrics)
            if "train_loss" in row
        }
        for folder in (RunFolder(tmp_path / name) for name in ("mine", "whole"))
    ]
    assert losses[0] == losses[1]
    assert list(losses[0]) == list(range(1, 41))
    results = [
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("mine", "whole")
    ]
    assert results[0]["after"] == results[1]["after"]
    assert results[0]["before"] == results[1]["before"] != {}


def test_another_program_saves_and_stops_a_run(tmp_path) -> None:
    (tmp_path / "saving.yaml").write_text(SAVING)
    config = ["--config=sft-lora", "--config=small/sft", "--config=saving.yaml", *QUIET]
    process = start(tmp_path, "fit", *config, "--run_dir=mine")
    folder = RunFolder(tmp_path / "mine")
    for wish, file in (("save_now", "saved.ckpt"), ("stop", "interrupted.ckpt")):
        while process.poll() is None and not (folder.status and folder.status.step > 1):
            time.sleep(0.02)
        folder.write(folder.control, {wish: True})
        while process.poll() is None and not (folder.checkpoints / file).exists():
            time.sleep(0.02)
        assert (folder.checkpoints / file).exists(), process.communicate()[1][-3000:]
    process.communicate(timeout=100)
    assert process.returncode == 130
    assert folder.status.state == "stopped"


def test_a_second_interrupt_stops_at_once(tmp_path) -> None:
    # One step takes the whole epoch, so that the first interrupt is still waiting for its end.
    long = ["--trainer.limit_train_batches=300", "--trainer.accumulate_grad_batches=300"]
    process = start(
        tmp_path, "fit", "--config=sft-lora", small("sft-lora"), *QUIET, *long, "--run_dir=mine"
    )
    folder = RunFolder(tmp_path / "mine")
    while process.poll() is None and not (folder.status and folder.status.state == "running"):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err[-3000:]
    assert "Press Ctrl-C again to stop at once" in err
    assert folder.status.state == "stopped"
    assert folder.newest_checkpoint() is None


def test_two_processes_keep_one_record(tmp_path) -> None:
    devices = [
        "--trainer.devices=2",
        "--trainer.accelerator=cpu",
        "--trainer.limit_train_batches=4",
    ]
    config = ["--config=sft-lora", "--config=small/sft", *QUIET, *devices]
    code, out, err = run(tmp_path, "fit", *config, "--json")
    assert code == 0, err[-3000:]
    result = json.loads(out)
    assert (result["devices"], result["steps"]) == (2, 4)
    folder = run_folder(tmp_path)
    steps = [row["step"] for row in folder.rows(folder.metrics) if "train_loss" in row]
    assert steps == [1, 2, 3, 4]
    assert folder.status.state == "finished"
    assert len(list(folder.rows(folder.samples))) == 6
    assert result["after"]["val_loss"] < result["before"]["val_loss"]


def test_a_killed_run_is_found_out(tmp_path) -> None:
    config = ["--config=sft-lora", "--config=small/sft", *QUIET]
    process = start(tmp_path, "fit", *config, "--run_dir=mine")
    folder = RunFolder(tmp_path / "mine")
    while process.poll() is None and folder.status is None:
        time.sleep(0.02)
    assert folder.status.state == "preparing"
    process.kill()
    process.communicate(timeout=100)
    assert folder.status.state == "crashed"


WRONG = {
    "--model.init_args.learning_rat=1": "near names: learning_rate",
    "--trainr.max_steps=1": "near names: trainer.max_steps",
    "--data.init_args.data=nowhere.jsonl": "no file or folder 'nowhere.jsonl'",
    "--config=sft-qlorra": "Near names: sft-qlora",
    "--resume=nowhere": "'nowhere': that is no folder of a run that can go on",
    "--trainer.limit_val_batches=0": "needs validation rows, and there are none",
}


@pytest.mark.parametrize("word", WRONG)
def test_bad_input_is_named_and_costs_nothing(word, tmp_path) -> None:
    code, out, err = run(tmp_path, "fit", "--config=sft-lora", "--config=small/sft", word)
    assert code == 2
    assert WRONG[word] in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.ckpt"))
    if "nowhere.jsonl" in word:
        folder = run_folder(tmp_path)
        assert folder.status.state == "failed"
        assert WRONG[word] in json.loads(folder.error.read_text())["message"]


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
