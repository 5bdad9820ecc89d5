"""The peak resident memory of real ``lightning-peft fit`` processes, against what was planned.

``planner_grid.py`` compares the tensors of a training step, byte for byte; a process holds more.
``python benchmarks/process_memory.py measure`` runs every row of :data:`ROWS` in a process of its
own, with validation, samples and checkpoints as in the recipes, and records the peak that the run
itself writes (``peak_memory`` in its ``result.json``), the resident memory of each phase, and the
day. ``--only`` measures some rows again; the others stay in the record with their day. ``table``
writes the table of ``docs/planner.md``. Without ``--smollm2 FOLDER``, a model of the same shape
with random weights is built, which takes the same memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from planner_grid import PAGE
from record import conditions, markdown, read, read_to_add, write, write_between

NAME = "process_memory"
DEMO = Path(__file__).parent.parent / "lightning_peft" / "demo" / "base"
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_KEYS = ("model", "method", "precision", "batch_size", "seq_len", "steps", "variable")
# Short rows have many lengths, so each batch has another; long ones are cut to one length.
_RUNS = [
    ("demo", "qlora", "32-true", 8, 64, 12),
    ("demo", "lora", "32-true", 8, 64, 12),
    ("demo", "lora", "bf16-mixed", 8, 64, 12),
    ("demo", "qlora", "bf16-mixed", 8, 256, 12),
    ("demo", "qlora", "bf16-mixed", 8, 256, 12, "ONEDNN_PRIMITIVE_CACHE_CAPACITY=0"),
    ("demo", "qlora", "bf16-mixed", 8, 256, 12, "MALLOC_MMAP_THRESHOLD_=65536"),
    ("demo", "lora", "32-true", 16, 256, 12),
    ("smollm2", "lora", "bf16-mixed", 8, 128, 4),
    ("smollm2", "lora", "32-true", 2, 512, 4),
    ("smollm2", "qlora", "bf16-mixed", 2, 512, 4),
    ("smollm2", "qlora", "32-true", 4, 128, 4),
    ("smollm2", "lora", "bf16-mixed", 2, 512, 4),
]
ROWS: list[dict[str, Any]] = [dict(zip(_KEYS, (*row, "")[:7], strict=True)) for row in _RUNS]


def data_of(row: dict[str, Any], model: Path, folder: Path) -> Path:
    """Writes rows of varied lengths, some of which are nearly as long as the row of the table."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    draw = random.Random(0)
    words = ["lamps", "chairs", "tables", "hooks", "bolts", "mirrors", "cups", "plates", "ropes"]
    path = folder / "data.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(160):
            # The template and the answer take up to thirty.
            wanted = draw.randint(row["seq_len"] // 4, row["seq_len"]) - 30
            order = f"Order {number}:"
            while len(tokenizer(order)["input_ids"]) < wanted:
                order += f" {draw.randint(1, 90)} {draw.choice(words)}"
            made = {"prompt": order, "completion": f"Order {number} is on its way."}
            file.write(json.dumps(made) + "\n")
    return path


def model_of(row: dict[str, Any], folder: Path, smollm2: Path | None) -> Path:
    """Returns the folder of the row's model, which is built where none is given."""
    if row["model"] == "demo":
        return DEMO
    if smollm2 is not None:
        return smollm2
    import torch
    import transformers

    model = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**SMOLLM2), dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder / "model")
    return folder / "model"


def words_of(row: dict[str, Any], model: Path, data: Path, run: Path) -> list[str]:
    """Returns the command."""
    values = {
        "model.init_args.model": model,
        "data.init_args.tokenizer": model,
        "data.init_args.data": data,
        "data.init_args.chat_template": "plain",
        "data.init_args.batch_size": row["batch_size"],
        "data.init_args.max_length": row["seq_len"],
        "data.init_args.over_long": "truncate",
        "trainer.precision": row["precision"],
        "trainer.max_steps": row["steps"],
        "trainer.accumulate_grad_batches": 1,
        "trainer.val_check_interval": "null",
        "trainer.limit_val_batches": 2 if row["model"] == "demo" else 1,
        "trainer.enable_progress_bar": "false",
        "run_dir": run,
    }
    command = Path(sys.executable).parent / "lightning-peft"
    return [
        str(command), "fit", f"--config=sft-{row['method']}",
        *(f"--{name}={value}" for name, value in values.items()),
    ]  # fmt: skip


def measured(row: dict[str, Any], smollm2: Path | None) -> dict[str, Any]:
    """Runs a row; returns its peak in bytes and the resident bytes of each phase."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = folder / "run"
        model = model_of(row, folder, smollm2)
        words = words_of(row, model, data_of(row, model, folder), run)
        name, _, value = row["variable"].partition("=")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({name: value} if name else {})}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
            phases: dict[str, dict[str, int]] = {}
            while process.poll() is None:
                with contextlib.suppress(OSError, ValueError, ProcessLookupError):
                    _sample(process.pid, run / "status.json", phases)
                time.sleep(0.05)
        if process.returncode:
            sys.exit((folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:])
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {"measured": result["peak_memory"]["process_bytes"], "phases": phases}


def _sample(pid: int, status: Path, phases: dict[str, dict[str, int]]) -> None:
    phase = "imports"
    with contextlib.suppress(FileNotFoundError):
        phase = json.loads(status.read_text(encoding="utf-8"))["phase"]
    found = phases.setdefault(phase, {})
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "RssAnon", "RssFile"):
            found[key] = max(found.get(key, 0), 1024 * int(value.split()[0]))


def kernel_bytes(products: int = 200) -> int:
    """Returns the resident bytes of a compiled product of 16-bit matrices, the mean of many."""
    import psutil
    import torch

    def multiply(rows: int) -> None:
        torch.ones(rows, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)

    for rows in range(1, 10):
        multiply(rows)
    before = psutil.Process().memory_info().rss
    for rows in range(10, 10 + products):
        multiply(rows)
    return (psutil.Process().memory_info().rss - before) // products


def measure(only: str, smollm2: Path | None, quick: bool) -> None:
    """Runs the rows, and puts each into the record as soon as it is measured."""
    record = (None if quick else read_to_add(NAME)) or {"rows": []}
    found = {_key(row): row for row in record["rows"]}
    # Once: kernels of the same shapes are there already the next time.
    kernel = kernel_bytes()
    chosen = [row for row in ROWS if only in " ".join(map(str, row.values()))]
    for row in chosen[:1] if quick else chosen:
        where = conditions()
        made = {**row, "date": where["date"], "commit": where["commit"], **measured(row, smollm2)}
        print(json.dumps(made), flush=True)
        found[_key(row)] = made
        kept = [found[_key(row)] for row in ROWS if _key(row) in found]
        content = {"conditions": where, "kernel_bytes": kernel, "rows": kept}
        write(NAME, content, quick=quick)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key, "") for key in _KEYS)


def plan(row: dict[str, Any]) -> Any:
    """Returns the prediction for a row."""
    import transformers

    from lightning_peft.plan.prediction import predict
    from lightning_peft.plan.settings import PlanSettings
    from lightning_peft.plan.sources import from_config, from_name
    from lightning_peft.tasks.token_loss import chunked_loss

    if row["model"] == "demo":
        source = from_name(str(DEMO))
    else:
        config = transformers.LlamaConfig(**SMOLLM2, architectures=["LlamaForCausalLM"])
        source = from_config(config, dtype="bfloat16")
    names = ("method", "precision", "batch_size", "seq_len")
    settings = PlanSettings(**{name: row[name] for name in names}, device="cpu")
    return predict(source, settings, chunked_loss)


def figures(record: dict[str, Any]) -> str:
    """Returns the memory of the first row before it trains, and the size of a kernel."""
    phases = record["rows"][0]["phases"]
    found = {
        "after the imports of `lightning-peft fit`": phases["imports"]["VmRSS"],
        "of these, mapped files": phases["imports"]["RssFile"],
        "with tokenizer, rows and evaluated base": phases["evaluating before training"]["VmRSS"],
        "one compiled kernel": record["kernel_bytes"],
    }
    rows = [(what, f"{size / 1e6:,.1f}") for what, size in found.items()]
    return "\n".join(markdown("resident | MB", rows))


def table(record: dict[str, Any]) -> str:
    """Returns the rows, with what is planned for each."""
    rows = []
    for row in record["rows"]:
        made = plan(row)
        ends = f"{made.low_bytes / 1e9:.2f} and {made.high_bytes / 1e9:.2f}"
        cells = [*(row[key] for key in _KEYS), f"{made.peak_bytes / 1e9:.2f}", ends]
        rows.append([*cells, f"{row['measured'] / 1e9:.2f}", row["date"]])
    columns = "model | method | precision | batch | length | steps | else | planned GB | ends"
    return "\n".join(markdown(f"{columns} | measured | on", rows))


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "table"])
    parser.add_argument("--only", default="", help="rows that contain this text")
    parser.add_argument("--quick", action="store_true", help="one row, and no record")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct")
    given = parser.parse_args()
    if given.command == "measure":
        measure(given.only, given.smollm2, given.quick)
    else:
        record = read(NAME)
        if record is None:
            sys.exit(f"no record {NAME}: run `measure` first")
        write_between("process figures", figures(record), PAGE)
        write_between("process table", table(record), PAGE)


if __name__ == "__main__":
    main()
