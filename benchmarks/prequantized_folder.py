"""The cache of quantized bases against an ordinary pre-quantized folder of transformers.

``python benchmarks/prequantized_folder.py [--layers N] [--repeats N] [--quick]`` writes a random
sharded Llama and fills both: the cache by a first start of the strategy, the folder by
``save_pretrained`` of the model that ``from_pretrained(quantization_config=...)`` gives. Then
second starts take turns in fresh processes, the strategy's injection included:

- ``cache``: ``from_pretrained`` of the dense files, codes from the cache.
- ``folder``: ``from_pretrained`` of the pre-quantized folder.
- ``folder_alone``: that without the strategy.

Besides seconds and memory (see ``base_loading.py``) it counts bytes on disk and lines of code (of
the modules of the cache, and of those of their functions that such a folder would replace), and
checks that the folder gives back all tensors bit for bit. Such a folder has no fingerprint of the
dense base, which adapters are checked against, and it holds the dense parts too. The record is
``benchmarks/records/prequantized_folder.json``.
"""

from __future__ import annotations

import argparse
import ast
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import base_loading
from loading_memory import write_model
from record import Way, conditions, interleaved, ratio, run_script, summary, write

WAYS = ("cache", "folder", "folder_alone")
LOADING = Path(__file__).parents[1] / "lightning_peft" / "engine" / "loading"
MODULES = ("quantized_cache", "tracked_loads", "weight_files")
# Reading and writing the codes, which transformers' own functions would do.
REPLACED = {"_read", "_weights", "store", "_write", "_shards", "crc", "_crc_of_parts"}


def save(source: str, folder: str) -> None:
    """Writes a pre-quantized folder, and prints whether it gives the same tensors back."""
    import torch
    from transformers import AutoModelForCausalLM

    from lightning_peft import engine

    settings = engine.quantization_config(bnb_4bit_compute_dtype="bfloat16")
    own: dict[str, Any] = {"dtype": "bfloat16", "device_map": {"": "cpu"}}
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, **own)
    model.save_pretrained(folder)
    seconds = time.perf_counter() - started
    before = model.state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder, **own).state_dict()
    equal = before.keys() == after.keys() and all(
        torch.equal(value, after[key]) for key, value in before.items()
    )
    print(json.dumps({"seconds": seconds, "equal": equal}))


def start(way: str, place: Path) -> Way:
    """Returns a function that loads in a fresh process."""
    kind = {"cache": "second", "folder": "prequantized", "folder_alone": "prequantized_alone"}[way]
    folder = place / ("model" if way == "cache" else "quantized")
    words = ["--load", kind, "--folder", str(folder)]
    return lambda: run_script(base_loading.__file__, *words, XDG_CACHE_HOME=str(place / "cache"))


def size_of(folder: Path) -> int:
    """Returns the bytes of the tensors in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def code_lines() -> dict[str, int]:
    """Returns the lines of the modules of the cache, and of the functions in question."""
    found = {"modules": 0, "replaced": 0}
    for name in MODULES:
        text = (LOADING / f"{name}.py").read_text(encoding="utf-8")
        found["modules"] += len(text.splitlines())
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name in REPLACED:
                found["replaced"] += (node.end_lineno or 0) - node.lineno + 1
    return found


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.save:
        save(*given.save)
        return
    where = conditions()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        layers = 1 if given.quick else given.layers
        write_model(place / "model", layers, "bfloat16")
        # A file that is two seconds old has its hash remembered.
        time.sleep(3)
        made = run_script(__file__, "--save", str(place / "model"), str(place / "quantized"))
        base_loading.started("first", place, "bfloat16")()
        ways = {way: start(way, place) for way in WAYS}
        runs = interleaved(ways, 1 if given.quick else given.repeats)
        disk = {"cache": size_of(place / "cache"), "folder": size_of(place / "quantized")}
    content = {
        "conditions": where,
        "layers": layers,
        "repeats": len(runs["cache"]),
        "disk_bytes": disk,
        "making_the_folder": made,
        "code_lines": code_lines(),
        "measured": summary(runs),
        "ratios": {
            f"{way}_to_cache_{measure}": ratio(runs, way, "cache", measure)
            for way in WAYS[1:]
            for measure in ("seconds", "peak_bytes")
        },
        "runs": runs,
    }
    for key in ("disk_bytes", "making_the_folder", "code_lines", "ratios"):
        print(f"{key}: {json.dumps(content[key])}")
    write("prequantized_folder", content, quick=given.quick)


if __name__ == "__main__":
    main()
