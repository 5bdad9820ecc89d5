"""A task is one registry entry: a toy one is trained, planned and listed, with no other change."""

import json
from importlib import import_module

import pytest
import yaml

from gradio_app.recipe.fields import BY_PATH
from gradio_app.recipe.form import applies, default_of
from gradio_app.recipe.validation import validate_content
from gradio_app.settings import Settings
from lightning_peft.cli import main
from lightning_peft.errors import ConfigError
from lightning_peft.export.loading_code import model_class, reader_class
from lightning_peft.recipe_files import recipe_files, resolved
from lightning_peft.runs.folder import RunFolder
from lightning_peft.task_registry import TASKS, TaskSpec, register_task, task_of_config

CODE = '''
from lightning_peft.data.supervised import SupervisedData
from lightning_peft.plugin.namespace import bind_to_lightning
from lightning_peft.tasks.causal_lm import CausalLM

class ToyTask(bind_to_lightning(CausalLM, "lightning.pytorch")):
    """A language model by another name."""

class ToyData(bind_to_lightning(SupervisedData, "lightning.pytorch")):
    """Rows by another name."""
'''
BASE = "package:demo/base"
RATE = "model.init_args.learning_rate"
RECIPE = {
    "seed_everything": 0,
    "model": {"class_path": "toy_task.ToyTask", "init_args": {"model": BASE}},
    "data": {
        "class_path": "toy_task.ToyData",
        "init_args": {
            "data": "rows.jsonl",
            "tokenizer": BASE,
            "chat_template": "plain",
            "validation_share": 0.4,
        },
    },
    "trainer": {
        "strategy": {"class_path": "lightning_peft.LoRAStrategy", "init_args": {"r": 2}},
        "max_steps": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The entry of a toy task, whose module and recipe are in the working directory."""
    (tmp_path / "toy_task.py").write_text(CODE)
    rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(TASKS)
    yield register_task(
        TaskSpec(
            name="toy",
            module="toy_task.ToyTask",
            data="toy_task.ToyData",
            shapes=(("prompt_completion", ("prompt", "completion")),),
            auto_class="AutoModelForToy",
            reader="AutoToyReader",
            sequences_per_row=3,
            defaults=((RATE, 1e-2),),
        )
    )
    TASKS.clear()
    TASKS.update(before)


def test_a_registered_task_is_trained_previewed_and_planned(toy, tmp_path, capsys):
    assert main(["fit", "--config=toy.yaml", "--run_dir=run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert RunFolder(tmp_path / "run").status.state == "finished"
    assert main(["preview", "--config=toy.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 12
    assert main(["plan", "--config=toy.yaml", "--seq-len=16", "--no-limits", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert (run["batch_size"], run["logits"]) == (8 * 3, "all")


def test_a_registered_task_is_in_the_form_and_in_exports(toy, tmp_path):
    assert task_of_config(RECIPE) is toy
    rate, prefix = BY_PATH[RATE], BY_PATH["data.init_args.prefix"]
    assert applies(rate, RECIPE)
    assert default_of(rate, RECIPE) == 1e-2
    assert not applies(prefix, RECIPE)
    assert not applies(BY_PATH["trainer.callbacks.LogSamples"], RECIPE)
    page = Settings.on_this_machine(tmp_path / "runs", tmp_path, tmp_path / "models")
    (tmp_path / "runs").mkdir()
    validate_content({**RECIPE, "trainer": {"max_steps": 1}}, page, "local")
    facts = {"base": {"class": "MyModelForToy"}, "data": {"class": "toy_task.ToyData"}}
    assert (model_class(facts), reader_class(facts)) == ("AutoModelForToy", "AutoToyReader")


def test_a_module_of_the_user_with_the_name_of_one_of_ours_is_no_task_of_ours():
    mine = {**RECIPE, "model": {"class_path": "mine.CausalLM"}}
    assert task_of_config(mine) is None


def test_a_name_is_taken_once():
    with pytest.raises(ConfigError, match=r"There is a task 'sft' already, of .*\.CausalLM"):
        register_task(TaskSpec("sft", "mine.Task", "mine.Data"))
    assert register_task(TASKS["sft"]) is TASKS["sft"]
    assert TASKS["sft"].module == "lightning_peft.tasks.CausalLM"


@pytest.mark.parametrize("name", TASKS)
def test_entries_fit_their_classes_and_recipes(name):
    spec = TASKS[name]
    for path in (spec.module, spec.data):
        package, _, cls = path.rpartition(".")
        assert getattr(import_module(package), cls).__name__ == cls
    for method in ("lora", "qlora"):
        content = yaml.safe_load(resolved(recipe_files()[f"{name}-{method}"]))
        assert task_of_config(content) is spec
        assert content["data"]["class_path"] == spec.data
        callbacks = content["trainer"]["callbacks"]
        best = next(one for one in callbacks if one["class_path"].endswith("BestCheckpoint"))
        monitored = {"monitor": "val_loss", "mode": "min", **best.get("init_args", {})}
        assert (monitored["monitor"], monitored["mode"]) == spec.metric
    module = getattr(import_module("lightning_peft.tasks"), spec.class_name)
    if spec.auto_class:
        assert module.auto_class.__name__ == spec.auto_class
    assert hasattr(module, "generate_samples") == spec.generates
