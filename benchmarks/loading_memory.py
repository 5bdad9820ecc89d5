"""Peak memory of loading a language model and preparing it for LoRA and QLoRA.

``python benchmarks/loading_memory.py [--layers N]`` writes a random Llama in bfloat16 to a
temporary folder, loads it in one fresh process per method, and prints the peak of anonymous memory
(private pages; the memory-mapped file is not counted) above what the imports take, as a ratio to
the size of the weights in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

METHODS = ("plain", "lora", "qlora")


def anonymous_bytes() -> int:
    """Returns the private memory of this process, from ``/proc`` (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("RssAnon is not in /proc/self/status; this benchmark needs Linux")


def write_model(folder: Path, layers: int) -> int:
    """Writes a random model and returns the bytes of its weights."""
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
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def load(method: str, folder: str, results: Any) -> None:
    """Loads the model through the strategy and reports peak and final memory."""
    import pytorch_lightning

    from lightning_peft import LoRAStrategy, QLoRAStrategy, engine
    from lightning_peft.tasks.causal_lm import CausalLM

    assert engine.inject  # everything that the imports cost is paid before the measurement
    strategies = {"lora": LoRAStrategy, "qlora": QLoRAStrategy}
    strategy: Any = strategies[method]() if method in strategies else "auto"
    trainer = pytorch_lightning.Trainer(
        strategy=strategy, devices=1, logger=False, enable_checkpointing=False
    )
    task = CausalLM(folder, dtype="bfloat16")
    before = anonymous_bytes()
    peak = before
    running = True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    trainer.strategy.connect(task)
    task.configure_model()
    final = anonymous_bytes()
    running = False
    watcher.join()
    results.put({"peak": max(peak, final) - before, "final": final - before})


def main() -> None:
    """Runs every method in a process of its own and prints one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    layers = parser.parse_args().layers
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(Path(folder), layers)
        for method in METHODS:
            results = context.Queue()
            process = context.Process(target=load, args=(method, folder, results))
            process.start()
            measured = results.get()
            process.join()
            ratios = {f"{k}_of_16_bit": round(v / weights, 3) for k, v in measured.items()}
            print(json.dumps({"method": method, "weights_16_bit": weights, **measured, **ratios}))


if __name__ == "__main__":
    main()
