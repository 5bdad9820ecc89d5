"""``lightning-peft merge`` as a user runs it, on a real run."""

import json
import signal
from pathlib import Path

import torch
from finished import BASE, ROOT, adapter_in, json_of
from program import wait
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_peft.cli import main


def test_a_checkpoint_becomes_a_model_folder(qlora_run, tmp_path, new_process):
    (checkpoint,) = (qlora_run / "checkpoints").glob("*.ckpt")
    report = json_of(new_process("merge", checkpoint, tmp_path / "out", "--json"))
    assert report["adapter"] == str(adapter_in(qlora_run))
    assert report["into"] == "dequantized"
    assert report["base_checked"] is True
    assert report["logit_errors"]["dequantized"]["relative"] < 0.005
    assert set(report["logit_errors"]) == {"dequantized", "original", "requantized"}
    assert set(report["weight_errors"]) == {"dequantized", "original", "requantized"}
    assert len(report["layers"]) == 28
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 4096
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    kept = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert kept["logit_errors"] == report["logit_errors"]
    assert str(ROOT) not in json.dumps(kept)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| dequantized (this folder) |" in card
    assert str(ROOT) not in card


def test_the_figures_are_printed(lora_run, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What does `len` do?\n\nWhat is a list?\n")
    words = ["merge", str(lora_run), str(tmp_path / "out"), "--prompts", str(prompts)]
    assert main([*words, "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "into the original base, 28 layers, float32" in said
    assert "original (chosen)" in said
    assert "dequantized" not in said
    assert main(["merge", str(lora_run), str(tmp_path / "other"), "--no-measure"]) == 0
    assert "outputs were not compared: it was not asked for" in capsys.readouterr().out


def test_bad_input(lora_run, tmp_path, refused):
    out, adapter = str(tmp_path / "out"), str(adapter_in(lora_run))
    for words, message in [
        (["nowhere", out], "'nowhere' is neither a folder nor a checkpoint here"),
        ([str(tmp_path), out], "neither an adapter folder nor the folder of a run"),
        ([str(BASE / "missing.ckpt"), out], "There is no adapter folder"),
        ([adapter, out, "--base", "no/such-model"], "the hub did not give it"),
        ([adapter, out, "--into", "dequantized"], "does not say that its base was quantized"),
        ([adapter, out, "--prompts", "absent.txt"], "absent.txt"),
        ([adapter, str(BASE)], "is there already"),
        ([adapter, out, "--dtype", "int4"], "int4"),
    ]:
        assert message in refused("merge", *words)
    assert not Path(out).exists()


def test_an_interrupt_says_so_and_leaves_nothing(qlora_run, tmp_path, program):
    process = program.start(tmp_path, "merge", str(qlora_run), str(tmp_path / "out"), code=SLOW)
    wait(process, lambda: list(tmp_path.glob(".incomplete-*/model.safetensors")))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "stopped" in said
    assert list(tmp_path.iterdir()) == []


# The command itself, on a disk that is slow.
SLOW = """
import sys, time
from lightning_peft.export import merged_folder
real = merged_folder.StreamedMerge.merged
def slow(self, *arguments):
    time.sleep(0.5)
    return real(self, *arguments)
merged_folder.StreamedMerge.merged = slow
from lightning_peft.cli import main
sys.exit(main(sys.argv[1:]))
"""
