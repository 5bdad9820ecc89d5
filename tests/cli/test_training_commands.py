"""``lightning-peft fit`` and its relatives: what they take, and what they say to bad input."""

import json
from pathlib import Path

import pytest
import yaml
from trials import TASKS, recipes_of

from lightning_peft.recipe_files import recipe_files
from lightning_peft.runs.folder import RunFolder

RECIPES = [name for name in recipe_files() if not name.startswith("small/") and name != "forkme"]


def test_all_recipes_are_tested():
    assert sorted(name for file in TASKS for name in recipes_of(file)) == sorted(RECIPES)
    here = Path(__file__).parent
    assert sorted(TASKS) == sorted(path.name for path in here.glob("test_trials_of_*.py"))


WRONG = {
    "--model.init_args.learning_rat=1": "near names: learning_rate",
    "--trainr.max_steps=1": "near names: trainer.max_steps",
    "--data.init_args.data=nowhere.jsonl": "no file or folder 'nowhere.jsonl'",
    "--config=sft-qlorra": "Near names: sft-qlora",
    "--resume=nowhere": "'nowhere': that is not a run folder that can be resumed",
    "--trainer.limit_val_batches=0": "needs validation rows, and there are none",
}


@pytest.mark.parametrize("word", WRONG)
def test_bad_input_is_named_and_costs_nothing(word, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert WRONG[word] in refused("fit", "--config=sft-lora", "--config=small/sft", word)
    assert not list(tmp_path.rglob("*.ckpt"))
    if "nowhere.jsonl" in word:
        (path,) = (tmp_path / "runs").iterdir()
        folder = RunFolder(path)
        assert folder.status.state == "failed"
        assert WRONG[word] in json.loads(folder.error.read_text())["message"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "a", "--resume", "b"], "--resume names several runs ('a', 'b')"),
        (["--resume", "--json", "a"], "--resume 'a': that is not a run folder"),
        (["--json"], "name a recipe with --config"),
        (["--json=x", "--config=sft-lora"], "there is no 'json'"),
    ],
)
def test_options_that_are_not_understood_are_explained(words, message, refused):
    assert message in refused("fit", *words)


def test_a_wrong_key_in_a_file(refused, tmp_path):
    (tmp_path / "own.yaml").write_text("trainer:\n  max_step: 3\n")
    words = ["--config=sft-lora", f"--config={tmp_path / 'own.yaml'}"]
    assert "near names: trainer.max_steps" in refused("fit", *words)


def test_recipes_are_listed_shown_and_copied(in_process, refused, tmp_path):
    done = in_process("recipes", "--json")
    assert done.returncode == 0
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert list(rows) == list(recipe_files())
    assert rows["sft-qlora"]["method"] == "QLoRAStrategy"
    done = in_process("recipes", "show", "sft-qlora")
    assert done.returncode == 0
    assert done.stdout == recipe_files()["sft-qlora"].read_text()
    assert in_process("recipes", "copy", "small/sft", "mine.yaml").returncode == 0
    assert "package:" not in (tmp_path / "mine.yaml").read_text().partition("model:")[2]
    assert "left alone" in refused("recipes", "copy", "small/sft", "mine.yaml")
    assert "sft-qlora" in refused("recipes", "show", "sft-qlorra")


def test_the_defaults_of_recipes_are_models_of_the_hub():
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
