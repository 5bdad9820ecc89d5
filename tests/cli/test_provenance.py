"""``verify RUN`` and ``reproduce RUN`` on a run of their own, whole and tampered with."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_peft.cli import main
from lightning_peft.demo.run import BASE, INSTRUCTIONS
from lightning_peft.runs.folder import RunFolder

STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory, program):
    """A folder with a run below it, with data and a base that can be tampered with."""
    folder = tmp_path_factory.mktemp("trained")
    rows = INSTRUCTIONS.read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(rows[:60] + rows[-10:]) + "\n")
    shutil.copytree(BASE, folder / "base")
    program.succeed(
        folder,
        "fit",
        "--config=sft-qlora",
        "--config=small/sft",
        "--run_dir=runs/one",
        f"--data.init_args.data={folder / 'rows.jsonl'}",
        f"--model.init_args.model={folder / 'base'}",
        f"--trainer.limit_train_batches={STEPS}",
        "--trainer.enable_progress_bar=false",
    )
    return folder


@pytest.fixture
def copy(trained, tmp_path, monkeypatch):
    """A copy of the run, in the working directory."""
    shutil.copytree(trained / "runs" / "one", tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    return RunFolder(tmp_path / "one")


def failed(capsys, *words):
    """Runs verify in this process and returns the names and details of the failed checks."""
    code = main(["verify", *words, "--json"])
    content = json.loads(capsys.readouterr().out)
    found = {c["name"]: c["detail"] for c in content["checks"] if c["passed"] is False}
    assert code == (1 if found else 0)
    assert content["passed"] == (not found)
    return found


def test_a_run_is_proven(trained, program):
    out = program.succeed(trained, "verify", "runs/one")
    lines = out.splitlines()
    assert len(lines) == 16
    for words in (
        "ok   the recipe is the one that was run: sha256 as recorded",
        "ok   adapter best: the weights are those that were saved",
        "ok   adapter last: it was made by this run",
        "ok   the base is the one that was trained on",
        "ok   the data is what was trained on",
        "ok   base unchanged by evaluation, training and a step",
    ):
        assert any(line.startswith(words) for line in lines), words
    assert not [line for line in lines if line.startswith("FAIL")]


def test_a_run_is_reproduced_to_the_bit(trained, program):
    out = program.succeed(trained, "reproduce", "runs/one", "--json", fresh=True)
    found = json.loads(out)
    assert found["identical"]
    assert found["steps"] == STEPS
    assert found["loss_difference"] == found["adapter_difference"] == 0
    assert found["metrics"]["val_loss"][0] == found["metrics"]["val_loss"][1]
    assert found["other"] == {}
    second = RunFolder(Path(found["folder"]))
    assert second.path.parent == trained / "runs"
    # Another learning rate is another run.
    recipe = second.recipe.read_text().replace("learning_rate: 0.005", "learning_rate: 0.004")
    assert recipe != second.recipe.read_text()
    second.recipe.write_text(recipe)
    code, out, err = program.run(trained, "reproduce", str(second.path), "--json")
    assert code == 1
    assert json.loads(out)["adapter_difference"] > 1e-5


def test_a_checkpoint_is_evaluated_and_predicts(trained, program):
    """The recipe that a run leaves is a config like any other."""
    run = RunFolder(trained / "runs" / "one")
    again = [f"--config={run.recipe}", f"--ckpt_path={run.checkpoints / 'best.ckpt'}"]
    out = program.succeed(trained, "validate", *again, "--json")
    after = json.loads(run.result.read_text())["after"]
    assert json.loads(out)["after"] == pytest.approx(after)
    (path,) = (trained / "runs").glob("*-validate-*")
    folder = RunFolder(path)
    assert "lightning_peft" in folder.recipe.read_text()
    assert folder.status.kind == "validate"
    assert folder.status.state == "finished"
    more = ["--trainer.limit_predict_batches=2", "--data.batch_size=3"]
    out = program.succeed(trained, "predict", *again, *more, "--run_dir=predicted")
    folder = RunFolder(trained / "predicted")
    predictions = list(folder.rows(folder.predictions))
    assert len(predictions) == 6
    assert all(row["generated"] != row["prompt"] for row in predictions)
    assert str(folder.predictions.relative_to(trained)) in out


def test_changed_files_are_found(copy, capsys):
    adapter = copy.checkpoints / "adapters" / "best"
    weights = adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    copy.recipe.write_text(copy.recipe.read_text().replace("r: 16", "r: 8"))
    facts = json.loads((copy.checkpoints / "adapters" / "last" / "provenance.json").read_text())
    facts["data"]["key"] = "another"
    facts["base"]["fingerprint"] = "another"
    (copy.checkpoints / "adapters" / "last" / "provenance.json").write_text(json.dumps(facts))
    from lightning_peft.runs.integrity import file_checks

    found = {c.name: c.detail for c in file_checks(copy.path) if c.passed is False}
    assert found["the recipe is the one that was run"] == "recipe.yaml was changed since the run"
    assert "sha256" in found["adapter best: the weights are those that were saved"]
    assert "other data, base than" in found["adapter last: it was made by this run"]
    assert len(found) == 3


def test_weights_that_diverged_are_not_taken_for_others(copy):
    adapter = copy.checkpoints / "adapters" / "best"
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(iter(tensors))
    tensors[key].fill_(torch.nan)
    save_file(tensors, adapter / "adapter_model.safetensors")
    facts = json.loads((adapter / "provenance.json").read_text())
    blob = (adapter / "adapter_model.safetensors").read_bytes()
    facts["adapter_sha256"] = hashlib.sha256(blob).hexdigest()
    (adapter / "provenance.json").write_text(json.dumps(facts))
    from lightning_peft.runs.integrity import file_checks

    found = {c.name: c.detail for c in file_checks(copy.path) if c.passed is False}
    assert list(found) == ["adapter best: its values are finite"]
    assert key.removeprefix("base_model.model.") in found["adapter best: its values are finite"]


def test_an_adapter_alone_is_checked_by_its_hash(copy, tmp_path, capsys):
    alone = tmp_path / "alone"
    shutil.copytree(copy.checkpoints / "adapters" / "best", alone)
    assert failed(capsys, str(alone)) == {}
    (alone / "adapter_model.safetensors").write_bytes(b"no tensors")
    found = failed(capsys, str(alone))
    assert list(found) == ["adapter alone: the weights are those that were saved"]


def test_changed_data_and_another_base_are_found(trained, copy, tmp_path, capsys):
    recipe = copy.recipe.read_text()
    other = tmp_path / "rows.jsonl"
    rows = (trained / "rows.jsonl").read_text()
    other.write_text(rows.replace("arguments", "parameters"))
    copy.recipe.write_text(recipe.replace(str(trained / "rows.jsonl"), str(other)))
    found = failed(capsys, str(copy.path))
    assert "rows or settings have changed" in found["the data is what was trained on"]
    assert set(found) == {"the recipe is the one that was run", "the data is what was trained on"}
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 64
    (base / "model.safetensors").write_bytes(content)
    copy.recipe.write_text(recipe.replace(str(trained / "base"), str(base)))
    found = failed(capsys, str(copy.path))
    assert "the base is the one that was trained on" in found


@pytest.mark.parametrize("name", ["verify", "reproduce"])
def test_what_is_no_run_is_bad_input(name, tmp_path, refused):
    assert str(tmp_path) in refused(name, str(tmp_path))
    assert main(["verify", str(tmp_path), "--config=sft-lora"]) == 2
