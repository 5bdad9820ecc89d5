"""What data costs: preparing it, waiting for it in training, and how soon the first step is done.

``python benchmarks/data_path.py [--repeats N] [--quick]`` writes made-up conversations and prepares
them with the tokenizer of the package in fresh processes, the ways in turn: ``one`` encodes in one
process, ``several`` in as many as there are cores, and ``cached`` finds them prepared. Times start
after the imports. ``first_step`` is ``lightning-peft fit`` with the small recipe ``sft-qlora``,
from the start of the command to the end of its first step, with the validation of the base before
it. ``waiting`` trains the base of the package and takes the time from the end of a step to the
beginning of the next, which is the loader's. The record is ``benchmarks/records/data_path.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import (
    QUIET,
    conditions,
    interleaved,
    ratio,
    run_script,
    spread,
    summary,
    with_empty_cache,
    write,
)

WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "was", "with", "not", "this", "from")
WAYS = ("one", "several", "cached")


def write_rows(file: Path, count: int) -> None:
    """Writes conversations of about 70 words."""
    drawn = random.Random(0)

    def words(most: int) -> str:
        return " ".join(drawn.choices(WORDS, k=drawn.randint(5, most)))

    with file.open("w", encoding="utf-8") as rows:
        for number in range(count):
            turns = [("user", f"{number} {words(50)}"), ("assistant", words(80))]
            messages = [{"role": role, "content": text} for role, text in turns]
            rows.write(json.dumps({"messages": messages}) + "\n")


def prepare(way: str, file: Path, cache: Path) -> None:
    """Prepares in this process and prints the seconds."""
    from lightning_peft import SupervisedData
    from lightning_peft.data.supervised import SupervisedRows
    from lightning_peft.demo.run import BASE

    SupervisedRows.parallelizable = way != "one"
    data = SupervisedData(
        str(file), str(BASE), chat_template="plain", max_length=256, cache_dir=str(cache)
    )
    # Reading the tokenizer is not part of it.
    assert data.tokenizer
    started = time.perf_counter()
    data.prepare_data()
    print(json.dumps({"seconds": time.perf_counter() - started}))


def wait(steps: int) -> None:
    """Trains, and prints the share of the time that steps wait for their batches."""
    import pytorch_lightning

    from lightning_peft import QLoRAStrategy, SupervisedData
    from lightning_peft.demo.run import BASE
    from lightning_peft.tasks.causal_lm import CausalLM

    class Watch(pytorch_lightning.Callback):
        waits: list[float] = []
        wholes: list[float] = []
        began = ended = 0.0

        def on_train_batch_start(self, *args: Any) -> None:
            now = time.perf_counter()
            if self.ended:
                self.waits.append(now - self.ended)
                self.wholes.append(now - self.began)
            self.began = now

        def on_train_batch_end(self, *args: Any) -> None:
            self.ended = time.perf_counter()

    watch = Watch()
    trainer = pytorch_lightning.Trainer(
        strategy=QLoRAStrategy(announce=False), max_steps=steps, callbacks=[watch], **QUIET
    )
    rows = Path(BASE).parent / "instructions.jsonl"
    data = SupervisedData(str(rows), str(BASE), chat_template="plain", batch_size=8)
    trainer.fit(CausalLM(str(BASE)), data)
    # The first one starts what is started once.
    share = sum(watch.waits[1:]) / sum(watch.wholes[1:])
    print(json.dumps({"share": share, "step_seconds": sum(watch.wholes[1:]) / len(watch.wholes)}))


def first_step(cache: Path) -> dict[str, float]:
    """Returns the seconds to the end of the first step of a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        words = ["fit", "--config=sft-qlora", "--config=small/sft", "--trainer.max_steps=2"]
        subprocess.run(
            [sys.executable, "-m", "lightning_peft.cli", *words],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(cache)},
            check=True,
            capture_output=True,
            timeout=300,
        )
        (file,) = Path(folder).glob("runs/*/metrics.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {"seconds": next(row["time"] for row in rows if "train_loss" in row) - started}


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--prepare", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--wait", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare, given.file, given.cache)
        return
    if given.wait:
        wait(given.wait)
        return
    where, rows = conditions(), 200 if given.quick else given.rows
    repeats = 1 if given.quick else given.repeats
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = folder / "rows.jsonl"
        write_rows(file, rows)
        ways = {
            way: with_empty_cache(__file__, folder, "--prepare", way, "--file", str(file))
            for way in ("one", "several")
        }
        cached = ("--prepare", "cached", "--file", str(file), "--cache", str(folder / "kept"))
        ways["cached"] = lambda: run_script(__file__, *cached)
        # Fills the cache.
        ways["cached"]()
        steps = "4" if given.quick else "40"
        ways["first_step"] = lambda: first_step(folder / "own")
        ways["waiting"] = lambda: run_script(
            __file__, "--wait", steps, XDG_CACHE_HOME=str(folder / "own")
        )
        runs = interleaved(ways, repeats)
    content = {
        "conditions": where,
        "rows": rows,
        "repeats": repeats,
        "measured": summary(runs),
        "ratios": {
            "preparing: several processes / one": ratio(runs, "several", "one", "seconds"),
            "preparing: found in the cache / one process": ratio(runs, "cached", "one", "seconds"),
            "training: waiting for a batch / step": spread([r["share"] for r in runs["waiting"]]),
            "rows a second, several processes": spread(
                [rows / run["seconds"] for run in runs["several"]]
            ),
            "seconds to the end of the first step of sft-qlora, small": spread(
                [run["seconds"] for run in runs["first_step"]]
            ),
        },
        "runs": runs,
    }
    write("data_path", content, quick=given.quick)


if __name__ == "__main__":
    main()
