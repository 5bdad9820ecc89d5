import json
import os

import pytest

from lightning_peft.errors import ConfigError
from lightning_peft.runs.folder import RunFolder, runs_in


def test_a_new_folder_is_named_after_time_and_recipe(tmp_path):
    folders = [RunFolder.create(tmp_path / "runs", "SFT & QLoRA!") for _ in range(3)]
    names = [folder.path.name for folder in folders]
    assert len(set(names)) == 3
    assert all("-sft-qlora-" in name for name in names)
    assert all(folder.checkpoints.is_dir() for folder in folders)
    assert all(folder.status is None for folder in folders)


def test_only_runs_are_listed_the_newest_first(tmp_path):
    names = ["20260102-000000-b", "20260101-000000-a"]
    for name in names:
        folder = RunFolder.at(tmp_path / name)
        folder.write(folder.status_file, {"state": "finished", "pid": 1})
    (tmp_path / "notes").mkdir()
    assert [run.path.name for run in runs_in(tmp_path)] == [
        "20260102-000000-b",
        "20260101-000000-a",
    ]


def test_a_line_that_is_half_written_is_not_read(tmp_path):
    folder = RunFolder.at(tmp_path)
    folder.append(folder.metrics, {"step": 1, "text": "ä"})
    with folder.metrics.open("a") as file:
        file.write('{"step": 2')
    assert list(folder.rows(folder.metrics)) == [{"step": 1, "text": "ä"}]
    assert list(folder.rows(folder.events)) == []


def test_a_file_is_replaced_as_a_whole(tmp_path):
    folder = RunFolder.at(tmp_path)
    folder.write(folder.result, {"a": 1})
    folder.write(folder.result, {"b": 2})
    assert json.loads(folder.result.read_text()) == {"b": 2}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "result.json"}


def test_a_recipe_runs_where_its_paths_lead_to_its_files(tmp_path, monkeypatch):
    begun, elsewhere = tmp_path / "über hier", tmp_path / "elsewhere"
    begun.mkdir(), elsewhere.mkdir()
    (begun / "rows.jsonl").touch()
    # Folders that share a name with another argument, and one that is written to.
    (begun / "lora").mkdir(), (begun / "question").mkdir(), (begun / "cache").mkdir()
    run = RunFolder.at(begun / "run")
    rows = "data: rows.jsonl, tokenizer: org/name, columns: {prompt: question}, cache_dir: cache"
    recipe = f"{{trainer: {{strategy: lora}}, data: {{init_args: {{{rows}}}}}}}"
    run.recipe.write_text(recipe, "utf-8")
    monkeypatch.chdir(elsewhere)
    # Runs of before do not say where they began.
    run.check_directory()
    run.write(run.provenance, {"directory": str(begun)})
    with pytest.raises(ConfigError, match="lead nowhere") as refused:
        run.check_directory()
    assert "data.init_args.data: 'rows.jsonl'" in str(refused.value)
    assert str(refused.value).count("\n") == 2
    assert f"cd '{begun}'" in str(refused.value)
    for given in (["--data.init_args.data=/o.jsonl"], ["--data.data", "/o.jsonl"], ["--config=o"]):
        run.check_directory(given)
    with pytest.raises(ConfigError):
        run.check_directory(["--data.data_share=1"])
    monkeypatch.chdir(begun)
    run.check_directory()
    (begun / "rows.jsonl").rename(elsewhere / "rows.jsonl")
    monkeypatch.chdir(elsewhere)
    run.check_directory()


def test_the_checkpoint_to_go_on_from(tmp_path):
    folder = RunFolder.at(tmp_path)
    assert folder.newest_checkpoint() is None
    for number, name in enumerate(["interrupted.ckpt", "last.ckpt"]):
        path = folder.checkpoints / name
        path.touch()
        os.utime(path, (number, number))
    assert folder.newest_checkpoint().name == "last.ckpt"
    stopped = {"state": "stopped", "checkpoint": "checkpoints/interrupted.ckpt"}
    folder.write(folder.status_file, stopped)
    assert folder.newest_checkpoint().name == "interrupted.ckpt"


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="run_dir"):
        RunFolder.at(tmp_path / "file" / "run")
