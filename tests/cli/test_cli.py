import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_peft.cli import command_names, main
from lightning_peft.demo.run import BASE, INSTRUCTIONS

COMMANDS = command_names()


HELP = """
import contextlib, io, json, sys
from lightning_peft.cli import main

heavy = {"torch", "transformers", "peft", "bitsandbytes", "pytorch_lightning"}
heavy |= {"huggingface_hub", "gradio"}
shown = {}
for name in ["", *sys.argv[1:]]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            assert main([name, "--help"] if name else ["--help"]) == 0
        except SystemExit as stop:
            assert stop.code == 0
    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))
    shown[name] = out.getvalue()
print(json.dumps(shown))
"""


def test_help_lists_commands_and_loads_nothing_heavy(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert all(word in shown[""] for word in COMMANDS)
    assert all(f"lightning-peft {name}" in shown[name] for name in COMMANDS)
    brief = {name for name in COMMANDS if "exit code" not in shown[name]}
    assert brief <= {"demo", "recipes"}


def test_no_command_or_a_wrong_one_is_bad_input(capsys, refused):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out
    assert "near names: preview" in refused("preveiw")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lightning-peft 0")


def test_a_wrong_option_and_a_wrong_value_are_named(refused, tmp_path):
    assert "there is no option --methd; near names: --method" in refused("demo", "--methd", "lora")
    assert "dora" in refused("demo", "--method", "dora")
    (tmp_path / "demo.yaml").write_text("method: vera\n")
    assert "vera" in refused("demo", "--config", tmp_path / "demo.yaml")
    order = "there is no option --output: write ADAPTER OUTPUT in this order, without names"
    assert order in refused("merge", "a", "--output", "b")


def test_a_model_that_cannot_be_had_is_an_error_in_words(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    said = refused("demo", "--model", "nobody/no-such-model", code=1)
    assert "nobody/no-such-model" in said
    assert "HF_HUB_OFFLINE" in said
    assert not (tmp_path / "demo-output").exists()


@pytest.fixture
def few_rows(tmp_path, monkeypatch):
    """Leaves so few examples and words that evaluating before and after takes no time."""
    rows = [json.loads(line) for line in INSTRUCTIONS.read_text().splitlines()]
    kept = [
        *[row for row in rows if row["split"] == "train"][:120],
        *[row for row in rows if row["split"] == "validation"][:30],
    ]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, kept)))
    monkeypatch.setattr("lightning_peft.demo.exercises.INSTRUCTIONS", tmp_path / "few.jsonl")
    monkeypatch.setattr("lightning_peft.demo.exercises.NEW_TOKENS", 8)
    monkeypatch.chdir(tmp_path)


def assert_the_demo_tuned(folder, said, method, steps):
    record = json.loads((folder / "result.json").read_text())
    assert record["seed"] == 3
    assert record["steps"] == steps
    before, after = record["held_out_loss"]
    assert after < 0.9 * before
    assert record["train_loss"][1] < record["train_loss"][0]
    assert len(record["samples"]) == 3
    for words in ("memory without activations", "loss of held-out rows", "Files", "Next"):
        assert words in said
    # All that it writes is there, prepared rows too.
    assert any((folder / "data").iterdir())
    assert (folder / "checkpoints" / "demo.ckpt").is_file()
    adapter = folder / "checkpoints" / "adapters" / "demo"
    assert adapter.is_dir() == (method != "full")
    assert ("q_proj" in said) == (method != "full")
    assert ("nf4, double quantization" in said) == (method == "qlora")


@pytest.mark.long
def test_the_demo_runs_and_tunes(new_process, tmp_path):
    done = new_process("demo", "--model", "toy", "--steps", "12", "--seed", "3", COLUMNS="100")
    assert done.returncode == 0, done.stderr
    assert_the_demo_tuned(tmp_path / "demo-output", done.stdout, "qlora", 12)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize(
    "method", [None, *(pytest.param(name, marks=pytest.mark.long) for name in ("lora", "full"))]
)
def test_the_demo_takes_arguments_from_a_file(tmp_path, monkeypatch, capsys, method):
    """By default those of the model and the steps: its own are the method and the folder."""
    monkeypatch.setenv("COLUMNS", "100")
    settings = f"method: {method}\noutput: elsewhere\n" if method else ""
    (tmp_path / "demo.yaml").write_text(f"model: toy\nsteps: 2\n{settings}")
    assert main(["demo", "--config", "demo.yaml", "--steps", "12", "--seed", "3"]) == 0
    folder = tmp_path / ("elsewhere" if method else "demo-output")
    assert_the_demo_tuned(folder, capsys.readouterr().out, method or "qlora", 12)
    if method == "lora":
        assert_plain_peft_reads(folder / "checkpoints" / "adapters" / "demo")


def assert_plain_peft_reads(folder):
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    ids = torch.arange(5, 25)[None]
    plain = base(ids).logits
    tuned = PeftModel.from_pretrained(base, str(folder))
    assert (tuned(ids).logits - plain).abs().max() > 0.1
    names = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
