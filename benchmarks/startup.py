"""What importing costs, and how soon the command line answers, against Lightning alone.

``python benchmarks/startup.py [--repeats N] [--quick]`` starts fresh processes, the ways in turn,
and writes ``benchmarks/records/startup.json``. Times are those of whole processes; ``nothing`` is
an empty one. ``import lightning_peft`` loads Lightning on first use only; ``first_strategy``
imports both and makes the first strategy, which is what a training script pays. ``first_step``,
where SmolLM2 is installed, is a run with the recipe's defaults on forty short chats, phase by
phase as ``fit --verbose`` gives them; one run before fills the caches.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from record import Way, conditions, interleaved, ratio, summary, write

from lightning_peft.demo.real_base import smollm2

COMMANDS = {
    "nothing": ["-c", "pass"],
    "lightning": ["-c", "import pytorch_lightning"],
    "ours": ["-c", "import lightning_peft"],
    "ours_and_lightning": ["-c", "import pytorch_lightning, lightning_peft"],
    "first_strategy": [
        "-c",
        "import pytorch_lightning, lightning_peft; lightning_peft.QLoRAStrategy()",
    ],
    "help": ["-m", "lightning_peft.cli", "--help"],
}
CHECKED = ("lightning", "ours_and_lightning", "help")


def timed(command: list[str]) -> Way:
    """Returns a function that runs Python with ``command`` and returns the seconds."""

    def run() -> Mapping[str, float]:
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=300)
        return {"seconds": time.perf_counter() - started}

    return run


def first_step(folder: Path, model: Path) -> Way:
    """Returns a function that runs a fit up to its first step, and returns the seconds by phase."""
    turns = [
        {"role": "user", "content": "What is {0} plus {0}?"},
        {"role": "assistant", "content": "It is {1}."},
    ]
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for n in range(40):
            chat = [{**turn, "content": turn["content"].format(n, 2 * n)} for turn in turns]
            file.write(json.dumps({"messages": chat}) + "\n")
    words = [
        *("-m", "lightning_peft.cli", "fit", "--verbose", "--config=sft-qlora"),
        *(f"--model.init_args.model={model}", f"--data.init_args.tokenizer={model}"),
        *("--data.init_args.data=chats.jsonl", "--trainer.max_steps=1"),
    ]

    def run() -> Mapping[str, float]:
        command = [sys.executable, *words]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=900, cwd=folder
        )
        table = done.stderr.partition("The first step was done after ")[2]
        phases = re.findall(r"^  (\S.*?) +([\d.]+) s$", table, re.MULTILINE)
        return {"seconds": float(table.split()[0]), **{name: float(s) for name, s in phases}}

    return run


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="once, to try the script")
    parser.add_argument("--check", action="store_true", help="a few times, for `all.py check`")
    given = parser.parse_args()
    names = CHECKED if given.check else tuple(COMMANDS)
    ways = {name: timed(COMMANDS[name]) for name in names}
    model = smollm2()
    folder = tempfile.TemporaryDirectory()
    if model is not None and not given.check:
        ways["first_step"] = first_step(Path(folder.name), model)
    where = conditions()
    for way in ways.values():
        # Compiled files and the page cache, for all alike.
        way()
    repeats = 1 if given.quick else 3 if given.check else given.repeats
    runs = interleaved(ways, repeats)
    pairs = {
        "import_both_to_lightning": ("ours_and_lightning", "lightning"),
        "import_to_lightning": ("ours", "lightning"),
        "first_strategy_to_lightning": ("first_strategy", "lightning"),
        "help_to_lightning": ("help", "lightning"),
    }
    folder.cleanup()
    content = {
        "conditions": where,
        "repeats": repeats,
        "seconds": summary(runs),
        "ratios": {
            name: ratio(runs, *pair, "seconds")
            for name, pair in pairs.items()
            if all(way in runs for way in pair)
        },
        "runs": runs,
    }
    write("startup", content, quick=given.quick, check=given.check)


if __name__ == "__main__":
    main()
