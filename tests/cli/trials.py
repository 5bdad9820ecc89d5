"""Small trials of recipes: which files test which, and what is asserted of each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from program import Program

from lightning_peft.runs.folder import RunFolder

METHODS = ("lora", "qlora")
# Near to another trial: dpo has the pairs of orpo and reward, and the reference of kto; grpo
# samples as validation does, speech has an encoder and a decoder as summaries and translation have,
# tokens are classified as texts and images are, answers about images have labels as those of texts;
# forkme is sft with every key.
NEAR = {
    *("grpo-qlora", "kto-qlora", "orpo-qlora", "reward-qlora"),
    *("summarization-qlora", "translation-qlora"),
    *("sft-qlora", "text-classification-qlora", "image-text-to-text-qlora"),
    "image-classification-qlora",
    *("embedding-qlora", "reranker-qlora"),
}
LONG = pytest.mark.long
# Tasks that share data are in one file, which one worker runs: the data is prepared once.
TASKS = {
    "test_trials_of_language.py": ("dpo", "grpo", "kto", "orpo", "reward", "sft"),
    "test_trials_of_classification.py": (
        *("embedding", "reranker"),
        "image-classification",
        "text-classification",
        "time-series",
        "token-classification",
    ),
    "test_trials_of_sequences.py": (
        *("image-text-to-text", "speech-recognition", "summarization", "translation"),
    ),
}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
QUIET += ["--trainer.strategy.init_args.announce=false"]


def recipes_of(file: str) -> list[str]:
    """Returns the recipes that a file tests."""
    return [f"{task}-{method}" for task in TASKS[Path(file).name] for method in METHODS]


def trials_of(file: str) -> list[Any]:
    """Returns the same for parametrization; trials that are near to another one are long.

    With LoRA all are: QLoRA is the harder case.
    """
    return [
        pytest.param(name, marks=[] if name.endswith("-qlora") and name not in NEAR else LONG)
        for name in recipes_of(file)
    ]


def small(recipe: str) -> str:
    """Returns the argument that makes a recipe a small trial."""
    task = "sft" if recipe == "forkme" else recipe.rpartition("-")[0]
    return f"--config=small/{task}"


def check_trial(recipe: str, program: Program, folder: Path) -> None:
    """Runs a recipe and asserts that it learns and leaves a whole run folder."""
    out = program.succeed(folder, "fit", f"--config={recipe}", small(recipe), *QUIET, "--json")
    result = json.loads(out)
    run = RunFolder(folder / result["folder"])
    assert run.path.parent == folder / "runs"
    assert run.path.name == result["run"]
    assert recipe in run.path.name
    assert run.status.state == "finished"
    assert run.status.step == result["steps"] > 0
    # A series validates each epoch, and so may stop early.
    if not recipe.startswith("time-series"):
        assert run.status.step == run.status.total_steps
    assert result["method"] == ("lora" if recipe.endswith("-lora") else "qlora")
    assert result["after"].keys() == result["before"].keys() >= {"val_loss"}
    assert result["after"]["val_loss"] < result["before"]["val_loss"]
    rows = list(run.rows(run.metrics))
    steps = [row["step"] for row in rows if "train_loss" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == result["steps"]
    # The adapter of the best checkpoint says what it is made of.
    adapter = run.checkpoints / "adapters" / "best"
    facts = json.loads((adapter / "provenance.json").read_text())
    provenance = json.loads(run.provenance.read_text())
    assert facts["run"] == result["run"]
    assert facts["recipe_sha256"] == provenance["recipe_sha256"] == result["recipe_sha256"]
    assert facts["data"] == provenance["data"] is not None
    assert facts["metrics"] == {"before": result["before"], "after": result["after"]}
    recipe_text = run.recipe.read_text()
    assert hashlib.sha256(recipe_text.encode()).hexdigest() == result["recipe_sha256"]
    content = yaml.safe_load(recipe_text)
    assert content["trainer"]["strategy"]["class_path"].endswith("LoRAStrategy")
    assert "ckpt_path" not in content
    if "LogSamples" in recipe_text:
        samples = list(run.rows(run.samples))
        validated = {row["step"] for row in rows if "val_loss" in row}
        assert {0, result["steps"]} <= {row["step"] for row in samples} <= validated
        assert all(row["prompt"] and row["expected"] for row in samples)
