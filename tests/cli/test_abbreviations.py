"""Every command wants its options in full, and names the nearest one for a part of a name."""

import pytest

from lightning_peft.cli import command_names, main

_RUN = ("--config=sft-qlora",)
# A beginning of one option of each command, what stands before it, and the option.
SHORT = {
    "demo": ("--ste=1", (), "--steps"),
    "doctor": ("--devi=cpu", (), "--device"),
    "app": ("--por=1", (), "--port"),
    "recipes": ("--js", (), "--json"),
    "preview": ("--trainer.max_step=1", (*_RUN, "--data=rows.jsonl"), "trainer.max_steps"),
    "check": ("--trainer.max_step=1", ("rows.jsonl", *_RUN), "trainer.max_steps"),
    "plan": ("--trainer.max_step=1", _RUN, "trainer.max_steps"),
    "fit": ("--trainer.max_step=1", _RUN, "trainer.max_steps"),
    "validate": ("--trainer.limit_val_batche=1", _RUN, "trainer.limit_val_batches"),
    "test": ("--trainer.limit_test_batche=1", _RUN, "trainer.limit_test_batches"),
    "predict": ("--trainer.limit_predict_batche=1", _RUN, "trainer.limit_predict_batches"),
    "sweep": ("--trainer.max_step=1", ("sft-qlora", "--set=r=8"), "trainer.max_steps"),
    "verify": ("--trainer.max_step=1", _RUN, "trainer.max_steps"),
    "reproduce": ("--js", ("runs/one",), "--json"),
    "chat": ("--temp=1", ("adapter",), "--temperature"),
    "compare": ("--bat=1", ("adapter", "--prompts=a.txt"), "--batch-size"),
    "evaluate": ("--lim=2", ("adapter", "--tasks=arc_easy"), "--limit"),
    "merge": ("--dty=float32", ("adapter",), "--dtype"),
    "export": ("--form=gguf", ("adapter", "out"), "--format"),
    "cache": ("--js", (), "--json"),
    "migrate": ("--dif", (".",), "--diff"),
    "import": ("--all=x", ("old.ckpt",), "--allow-unmapped"),
}
MORE = {
    "preview": [("--js", "json"), ("--ro=2", "rows"), ("--enc=utf-8", "encoding")],
    "check": [("--js", "json"), ("--conf=sft-lora", "config"), ("--del=;", "delimiter")],
    "plan": [("--mod=x", "model"), ("--seq=8", "seq-len")],
    "fit": [("--js", "json"), ("--conf=sft-lora", "config"), ("--run_di=x", "run_dir")],
    "sweep": [("--js", "json"), ("--sam=tpe", "sampler"), ("--conf=sft-lora", "config")],
    "verify": [("--conf=sft-lora", "config"), ("--ckpt_pat=x", "ckpt_path")],
    "cache": [("clear --al", "all")],
}


def said(capsys, name, *words):
    assert main([name, *words]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def test_every_command_is_tried():
    assert sorted(SHORT) == sorted(command_names())


@pytest.mark.parametrize("name", SHORT)
def test_an_abbreviation_is_answered_with_the_option(name, capsys):
    short, before, whole = SHORT[name]
    text = said(capsys, name, *before, short)
    wrong = short.partition("=")[0].removeprefix("--")
    assert wrong in text
    assert f"near names: {whole}" in text


@pytest.mark.parametrize(
    ("name", "short", "whole"), [(n, *two) for n, v in MORE.items() for two in v]
)
def test_options_of_the_command_itself(name, short, whole, capsys):
    before = ("rows.jsonl",) if name == "check" else ()
    line = said(capsys, name, *before, *short.split()).splitlines()[0]
    assert whole in line.partition("near names: ")[2].replace("--", "").split(", ")
