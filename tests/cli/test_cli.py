import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_peft.cli import COMMANDS, main
from lightning_peft.demo.run import BASE


def run(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lightning_peft.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("asked", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_lists_commands_and_loads_nothing_heavy(asked, tmp_path):
    code = (
        "import sys; from lightning_peft.cli import COMMANDS, main\n"
        f"try: assert main({[*asked, '--help']}) == 0\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'pytorch_lightning'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = ["lightning-peft", *asked] if asked else COMMANDS
    assert all(word in done.stdout for word in expected)
    assert "exit code" in done.stdout or not asked or asked[0] in ("demo", "recipes")


def test_no_command_or_a_wrong_one_is_bad_input(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out
    assert main(["preveiw"]) == 2
    assert "near names: preview" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lightning-peft 0")


def test_a_wrong_option_and_a_wrong_value_are_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--methd", "lora"])
    assert stop.value.code == 2
    assert "--methd" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--method", "dora"])
    assert stop.value.code == 2
    assert "dora" in capsys.readouterr().err


def test_a_model_that_cannot_be_had_is_an_error_in_words(tmp_path):
    done = run("demo", "--model", "nobody/no-such-model", cwd=tmp_path)
    assert done.returncode == 1
    assert "nobody/no-such-model" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "demo-output").exists()


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_the_demo_runs_and_tunes(tmp_path, method):
    done = run(
        "demo", "--method", method, "--steps", "30", "--seed", "3", cwd=tmp_path, COLUMNS="100"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "demo-output" / "result.json").read_text())
    assert record["seed"] == 3
    assert record["steps"] == 30
    before, after = record["held_out_loss"]
    assert after < 0.9 * before
    assert record["train_loss"][1] < record["train_loss"][0]
    assert len(record["samples"]) == 3
    for words in ("memory without activations", "held-out rows", "Files", "Next"):
        assert words in done.stdout
    checkpoint = tmp_path / "demo-output" / "checkpoints" / "demo.ckpt"
    assert checkpoint.is_file()
    folder = tmp_path / "demo-output" / "checkpoints" / "adapters" / "demo"
    assert folder.is_dir() == (method != "full")
    assert ("q_proj" in done.stdout) == (method != "full")
    assert ("nf4, double quantization" in done.stdout) == (method == "qlora")
    if method == "lora":
        assert_plain_peft_reads(folder)


def assert_plain_peft_reads(folder):
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    ids = torch.arange(5, 25)[None]
    plain = base(ids).logits
    tuned = PeftModel.from_pretrained(base, str(folder))
    assert (tuned(ids).logits - plain).abs().max() > 0.1
    names = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in names)


def test_arguments_can_come_from_a_file(tmp_path):
    (tmp_path / "demo.yaml").write_text("method: lora\nsteps: 2\noutput: elsewhere\n")
    done = run("demo", "--config", "demo.yaml", "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "elsewhere" / "result.json").read_text())
    assert (record["method"], record["steps"]) == ("lora", 3)
