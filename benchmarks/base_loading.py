"""Time and peak memory of getting a sharded checkpoint into NF4: ours, transformers', the cache.

``python benchmarks/base_loading.py [--layers N] [--repeats N] [--quick]`` writes a random sharded
Llama, loads it in fresh processes, the ways in turn, and writes
``benchmarks/records/base_loading.json``. ``first`` is the strategy with an empty cache, which it
fills; ``second`` finds it there; ``uncached`` is the strategy with ``cache_quantized_base=False``;
``transformers`` lets ``from_pretrained`` quantize; ``transformers_alone`` is that without the
strategy. Time starts after the imports. Memory is anonymous (memory-mapped files are not counted),
above what the imports take; ``resident`` counts mapped pages too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loading_memory import PeakMemory, write_model
from record import Way, conditions, interleaved, ratio, run_script, spread, summary, write

WAYS = ("first", "second", "uncached", "transformers", "transformers_alone")
# Of a folder that is quantized already; for `prequantized_folder.py`.
PREQUANTIZED = ("prequantized", "prequantized_alone")


def load(way: str, folder: str, dtype: str) -> None:
    """Loads in this process and prints what it took."""
    import pytorch_lightning
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    from lightning_peft import QLoRAStrategy, engine
    from lightning_peft.engine.loading import quantized_cache
    from lightning_peft.tasks.causal_lm import CausalLM

    # Small models are measured too when trying the script.
    quantized_cache.SMALLEST = 0
    # Loaded on first use otherwise, which is not part of loading weights.
    assert engine.inject
    assert modeling_llama.LlamaForCausalLM
    own: dict[str, Any] = {"dtype": dtype}
    if way.startswith(("transformers", "prequantized")):
        own["device_map"] = {"": "cpu"}
    if way.startswith("transformers"):
        own["quantization_config"] = engine.quantization_config(bnb_4bit_compute_dtype="bfloat16")

    class InItsOwnWay(CausalLM):
        def configure_model(self) -> None:
            self.model = AutoModelForCausalLM.from_pretrained(folder, **own)

    task: Any = InItsOwnWay(folder, dtype=dtype)
    if not way.endswith("_alone"):
        kept = way in ("first", "second")
        strategy = QLoRAStrategy(announce=False, cache_quantized_base=kept)
        trainer = pytorch_lightning.Trainer(
            strategy=strategy, devices=1, logger=False, enable_checkpointing=False
        )
        trainer.strategy.connect(task)
    with PeakMemory() as watched:
        started = time.perf_counter()
        task.configure_model()
        seconds = time.perf_counter() - started
    found = {
        "seconds": seconds,
        "peak_bytes": watched.peak["RssAnon"],
        "resident_peak_bytes": watched.peak["VmRSS"],
        "final_bytes": watched.final,
    }
    print(json.dumps(found))


def started(way: str, folder: Path, dtype: str) -> Way:
    """Returns a function that loads in a fresh process."""

    def run() -> Mapping[str, float]:
        cache = folder / "cache"
        bases = cache / "lightning-peft"
        if way == "first":
            shutil.rmtree(bases, ignore_errors=True)
        elif way == "second" and not list((bases / "bases").glob("*")):
            # Odd turns go backwards.
            started("first", folder, dtype)()
        words = ["--load", way, "--folder", str(folder / "model"), "--dtype", dtype]
        return run_script(__file__, *words, XDG_CACHE_HOME=str(cache))

    return run


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--file-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true", help="few layers, for `all.py check`")
    parser.add_argument("--load", choices=(*WAYS, *PREQUANTIZED), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        load(given.load, given.folder, given.dtype)
        return
    where = conditions()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        layers = 1 if given.quick else 8 if given.check else given.layers
        weights = write_model(folder / "model", layers, given.file_dtype)
        # A file that is two seconds old has its hash remembered.
        time.sleep(3)
        ways = {way: started(way, folder, given.dtype) for way in WAYS}
        runs = interleaved(ways, 1 if given.quick else given.repeats)
        kept = sum(file.stat().st_size for file in (folder / "cache").rglob("*.safetensors"))
    largest = weights["largest_tensor"]
    for run in [run for turns in runs.values() for run in turns]:
        run["peak_to_allowed"] = run["peak_bytes"] / (1.25 * run["final_bytes"] + largest)
    pairs = {
        "second_to_first": ("second", "first"),
        "second_to_uncached": ("second", "uncached"),
        "first_to_transformers": ("first", "transformers"),
        "first_to_transformers_alone": ("first", "transformers_alone"),
        "uncached_to_transformers_alone": ("uncached", "transformers_alone"),
    }
    content = {
        "conditions": where,
        "model": {"layers": layers, "file_dtype": given.file_dtype, "bytes": weights},
        "cache_bytes": kept,
        "repeats": len(runs["first"]),
        "measured": summary(runs),
        "ratios": {
            f"{name}_{measure}": ratio(runs, *pair, measure)
            for name, pair in pairs.items()
            for measure in ("seconds", "peak_bytes")
        }
        | {
            f"{way}_peak_to_allowed": spread([run["peak_to_allowed"] for run in runs[way]])
            for way in ("first", "uncached")
        },
        "runs": runs,
    }
    write("base_loading", content, quick=given.quick, check=given.check)


if __name__ == "__main__":
    main()
