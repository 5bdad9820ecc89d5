"""``lightning-peft export --format gguf``: files, their record, and what is refused before."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from finished import BASE
from llama_cpp import LlamaCpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_peft.cli import main

TALK = [{"role": "user", "content": "What does `len` do?"}]


def answer(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    return found[0, len(ids) :].tolist()


def test_the_merged_model(qlora_run, tmp_path, exported):
    out, merged = tmp_path / "out", tmp_path / "merged"
    words = ("--chat-template", "chatml", "--base-name", "org/base")
    found = exported(qlora_run, out, "gguf", *words)
    file = out / "mine-f16.gguf"
    assert [each["path"] for each in found["files"]] == [
        "README.md",
        "gguf_report.json",
        "mine-f16.gguf",
    ]
    record = json.loads((out / "gguf_report.json").read_text())
    assert record == found["gguf"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (written,) = record["files"]
    assert written == {
        "part": "model",
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": digest,
    }
    assert record["architecture"] == "llama"
    assert record["tokenizer"] == "gpt-2"
    assert record["base_checked"] is True
    # Read back by transformers, on the prompts of a merge.
    assert record["logit_error"]["relative"] < 0.005
    assert found["merge"]["into"] == "dequantized"
    assert digest in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "gguf_report.json").read_text()
    assert found["commands"][0] == f"llama-cli -m {file}"
    exported(qlora_run, merged, "merged", *words[:2], "--dtype", "float16", "--no-measure")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    llama = LlamaCpp(file)
    # It puts the first token before every text, so its conversations leave that out.
    assert f"<s>{llama.prompt(TALK)}" == text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert llama.tokens(llama.prompt(TALK)) == ids
    assert llama.continued(ids, 12)["tokens"] == answer(merged, ids)


def test_the_adapter_alone(lora_run, tmp_path, exported):
    found = exported(lora_run, tmp_path / "out", "gguf", "--adapter-only")
    assert [each["file"] for each in found["gguf"]["files"]] == ["mine-lora-f32.gguf"]
    assert found["commands"] == [
        f"llama-cli -m BASE.gguf --lora {tmp_path / 'out' / 'mine-lora-f32.gguf'}",
        f"llama-server -m BASE.gguf --lora {tmp_path / 'out' / 'mine-lora-f32.gguf'}",
    ]
    assert found["gguf"]["not_measured"] == "base and adapter are in files of their own"
    assert "merge" not in found


@pytest.mark.long
def test_base_and_adapter(qlora_run, tmp_path, exported):
    out = tmp_path / "out"
    found = exported(qlora_run, out, "gguf", "--with-adapter", "--outtype", "q8_0")
    parts = {each["part"]: each["file"] for each in found["gguf"]["files"]}
    assert parts == {"base": "base-q8_0.gguf", "adapter": "mine-lora-f32.gguf"}
    assert any("trained on a 4-bit base, and is applied to another" in n for n in found["notes"])
    both = LlamaCpp(out / parts["base"], out / parts["adapter"]).continued([1, 100, 200], 4)
    alone = LlamaCpp(out / parts["base"]).continued([1, 100, 200], 4)
    assert both["logprobs"][0] != alone["logprobs"][0]


def stand_in(folder, body):
    """A program that is called as llama-quantize is."""
    program = folder / "llama-quantize"
    program.write_text(f"#!{sys.executable}\nimport shutil, sys\n{body}\n")
    program.chmod(0o755)
    return program


def test_other_numbers_by_llama_quantize(lora_run, tmp_path, exported, capsys, monkeypatch):
    program = stand_in(
        tmp_path, "assert sys.argv[3] == 'Q4_K_M'; shutil.copy(sys.argv[1], sys.argv[2])"
    )
    words = ("--outtype", "Q4_K_M", "--no-measure")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = exported(lora_run, tmp_path / "out", "gguf", *words)
    assert {each["path"] for each in found["files"]} == {
        "README.md",
        "gguf_report.json",
        "mine-q4_k_m.gguf",
    }
    assert any("those of q4_k_m come on top" in note for note in found["notes"])
    stand_in(tmp_path, "sys.exit('main: failed to quantize model')")
    given = ["export", str(lora_run), str(tmp_path / "no"), "--format", "gguf", *words]
    assert main([*given, "--llama-quantize", str(program)]) == 2
    assert "ended with exit code 1 for Q4_K_M: main: failed to qu" in capsys.readouterr().err
    assert not list(tmp_path.glob("*no*"))


def test_bad_input(lora_run, tmp_path, refused):
    out = str(tmp_path / "out")
    for words, message in [
        (["--dtype", "float16"], "dtype='float16': a GGUF file has its own names"),
        (["--outtype", "q4_k_x"], "'q4_k_x' is not a type of GGUF files; near names: q4_k_"),
        (["--outtype", "q4_k_m"], "alone, and llama-quantize is not on PATH"),
        (["--outtype", "q6_k", "--llama-quantize", "/no/such"], "'/no/such' is not a program"),
        (["--outtype", "bf16", "--adapter-only"], "an adapter is written in f32 or f16"),
        (["--adapter-only", "--with-adapter"], "writes the adapter, and --with-adapter its base"),
        (["--format", "merged", "--with-adapter"], "--with-adapter is for --format gguf or olla"),
        (["--system", "Be brief."], "--system is for --format ollama"),
        (["--format", "vllm", "--adapter-only"], "--adapter-only is for --format gguf"),
        (["--format", "merged", "--outtype", "f16"], "--outtype is for --format gguf or ollama"),
    ]:
        given = ["export", str(lora_run), out, "--format", "gguf", *words]
        assert message in refused(*given)
    assert not Path(out).exists()


def test_another_tokenizer(lora_run, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    described = json.loads((base / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "Lowercase"}
    (base / "tokenizer.json").write_text(json.dumps(described))
    given = ["export", str(lora_run), str(tmp_path / "out"), "--format", "gguf"]
    assert main([*given, "--base", str(base)]) == 1
    said = capsys.readouterr().err
    assert "llama.cpp would give other tokens than in training" in said
    assert 'changes text first: [{"type": "Lowercase"}]' in said
    # Without numbers that were asked for, Ollama gets a folder of safetensors.
    given[-1:] = ["ollama", "--base", str(base), "--chat-template", "chatml", "--no-measure"]
    assert main([*given, "--no-check-base", "--outtype", "q8_0"]) == 1
    assert "llama.cpp would give other tokens than in training" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_dtype_of_an_ollama_model(lora_run, tmp_path, exported):
    words = ("--dtype", "bfloat16", "--chat-template", "chatml", "--no-measure")
    found = exported(lora_run, tmp_path / "out", "ollama", *words)
    assert found["gguf"]["outtype"] == "bf16"
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./mine-bf16.gguf\n")
