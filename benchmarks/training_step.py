"""Training steps of this project beside those of its peers, and beside the floor.

``python benchmarks/training_step.py measure [--device cuda] [--rounds N] [--only CASE]`` runs every
case of :data:`CASES` with each of its methods in a process of its own. All processes of a case are
alive at once, and take turns: one block of steps each, in an order that changes with every round,
so that a machine that gets slower does so for all. The first block warms up. Afterwards each method
takes one more step alone, under the profiler, for its peak memory: on the CPU the bytes of torch's
allocator, on a GPU ``torch.cuda.max_memory_allocated``. A method whose package is not installed is
skipped, and the record says so. ``--trial`` runs tiny models for two rounds, to see that all of it
works; nothing is kept.

The record is ``training_step_DEVICE.json`` beside this file. ``python benchmarks/training_step.py
table`` writes its tables into ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from training_methods import METHODS, Case, Finished, Pace

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
PACKAGES = ("torch", "pytorch-lightning", "transformers", "peft", "bitsandbytes", "trl")
NEEDS = {"trl": "trl", "trl packed": "trl", "hugging face": "accelerate"}
STEP = ("engine", "strategy", "peft", "floor")

CASES: list[tuple[Case, tuple[str, ...]]] = [
    *(
        (Case(f"{name}, dropout {p:g}", "40M", name == "QLoRA", p, rows=2, length=256), STEP)
        for name in ("QLoRA", "LoRA")
        for p in (0.0, 0.05)
    ),
    (
        Case("instructions", "40M", True, rows=8, length=1024, data="instructions"),
        ("recipe", "peft", "trl", "trl packed"),
    ),
    (
        Case("wide vocabulary", "wide vocabulary", True, rows=1, length=1024, data="prompts"),
        ("recipe", "hugging face"),
    ),
]
# What is held against what: case, method, other, measure, and the largest ratio that is aimed at.
TARGETS: list[tuple[str, str, str, str, float]] = [
    *((f"{name}, dropout 0", "engine", "peft", "seconds", 0.88) for name in ("QLoRA", "LoRA")),
    *((f"{name}, dropout 0.05", "engine", "peft", "seconds", 0.80) for name in ("QLoRA", "LoRA")),
    *((f"{name}, dropout 0", "engine", "peft", "peak", 0.90) for name in ("QLoRA", "LoRA")),
    *((f"{name}, dropout 0", "engine", "floor", "seconds", 1.10) for name in ("QLoRA", "LoRA")),
    ("QLoRA, dropout 0", "strategy", "engine", "seconds", 1.03),
    ("instructions", "recipe", "trl", "seconds per token", 1 / 5),
    ("instructions", "recipe", "trl packed", "seconds per token", 1 / 2.5),
    ("instructions", "recipe", "peft", "seconds per token", 1 / 3),
    ("instructions", "recipe", "trl", "peak", 0.35),
    ("wide vocabulary", "recipe", "hugging face", "peak", 0.50),
]


class Worker:
    """One method of a case, in a process of its own."""

    def __init__(self, case: int, method: str, given: argparse.Namespace) -> None:
        words = ["--device", given.device, "--block", str(given.block), "--case", str(case)]
        command = [sys.executable, __file__, "work", *words, "--method", method]
        self.method = method
        # A file: nobody reads here while the process runs.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, *(["--trial"] if given.trial else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, order: str) -> dict[str, Any]:
        """Sends one order and returns the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{order}\n")
            self.process.stdin.flush()
        # Libraries print too.
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        self.process.wait()
        self.errors.seek(0)
        said = [line for line in self.errors if line.strip()] or ["no message"]
        raise RuntimeError(f"{self.method}: {said[-1].strip()}")

    def end(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.errors.close()


def measure_case(number: int, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of one case."""
    case, methods = case_of(number, given.trial)
    missing = [m for m in methods if m in NEEDS and importlib.util.find_spec(NEEDS[m]) is None]
    for method in missing:
        print(f"{case.name}: {method} is skipped, {NEEDS[method]} is not installed", flush=True)
    workers = [Worker(number, method, given) for method in methods if method not in missing]
    found: dict[str, Any] = {method: {"skipped": f"no {NEEDS[method]}"} for method in missing}
    try:
        for turn in range(given.rounds + 1):
            first = turn % len(workers)
            for worker in [*workers[first:], *workers[:first]]:
                answer = worker.ask("block")
                if turn:
                    record = found.setdefault(worker.method, {"blocks": [], "tokens": []})
                    record["blocks"].append(statistics.median(answer["seconds"]))
                    record["tokens"].append(answer["tokens"] / sum(answer["seconds"]))
            print(f"{case.name}: round {turn} of {given.rounds}", file=sys.stderr, flush=True)
        for worker in workers:
            found[worker.method]["peak"] = worker.ask("memory")["peak"]
    finally:
        for worker in workers:
            worker.end()
    return {"case": case.name, "methods": found}


def case_of(number: int, trial: bool) -> tuple[Case, tuple[str, ...]]:
    """Returns a case and its methods; of a trial, with a tiny model and few tokens."""
    case, methods = CASES[number]
    return (replace(case, size="tiny", length=min(case.length, 64)) if trial else case), methods


def measure(given: argparse.Namespace) -> None:
    """Runs the cases and writes the record after each."""
    file = HERE / f"training_step_{given.device}.json"
    content = {"conditions": conditions(given), "cases": []}
    for number, (case, _) in enumerate(CASES):
        if given.only not in case.name:
            continue
        content["cases"].append(measure_case(number, given))
        if not given.trial and not given.only:
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n".join(tables(content)))


def conditions(given: argparse.Namespace) -> dict[str, Any]:
    """Returns what the measurement was made with."""
    import torch

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cuda = given.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "rounds": given.rounds,
        "steps in a block": given.block,
        "python": platform.python_version(),
        **versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def value(record: dict[str, Any], measure: str) -> float:
    """Returns one number of a method: a median over blocks, or its peak."""
    if measure == "peak":
        return float(record["peak"])
    if measure == "seconds per token":
        return 1 / statistics.median(record["tokens"])
    return statistics.median(record["blocks"])


def tables(content: dict[str, Any]) -> list[str]:
    """Returns the measured values, and the ratios beside what is aimed at."""
    cases = {entry["case"]: entry["methods"] for entry in content["cases"]}
    lines = [
        "; ".join(f"{name} {said}" for name, said in content["conditions"].items()) + ".",
        "",
        "| case | method | ms per step | from | to | tokens per second | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, methods in cases.items():
        for method, record in methods.items():
            if "skipped" in record:
                lines.append(f"| {case} | {method} | skipped: {record['skipped']} | | | | |")
                continue
            blocks = [1e3 * seconds for seconds in record["blocks"]]
            spread = (statistics.median(blocks), min(blocks), max(blocks))
            cells = [*(f"{ms:.1f}" for ms in spread), f"{statistics.median(record['tokens']):,.0f}"]
            peak = f"{record['peak'] / 1e6:,.1f}"
            lines.append(f"| {case} | {method} | {' | '.join(cells)} | {peak} |")
    lines += ["", "| case | ratio | of | measured | target | met |", "| --- " * 6 + "|"]
    for case, method, other, measure, most in TARGETS:
        records = [cases.get(case, {}).get(name, {"skipped": ""}) for name in (method, other)]
        if any("skipped" in record for record in records):
            continue
        ratio = value(records[0], measure) / value(records[1], measure)
        met = "yes" if ratio <= most else "no"
        lines.append(
            f"| {case} | {method} / {other} | {measure} | {ratio:.3f} | {most:.2f} | {met} |"
        )
    return lines


def write_page(device: str) -> None:
    """Puts the tables of a record between its marks in the page."""
    file = HERE / f"training_step_{device}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    begin, end = (f"<!-- {device} training step {word} -->" for word in ("begins", "ends"))
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{PAGE} has no marks {begin} and {end}")
    text = "\n".join(tables(content))
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def work(given: argparse.Namespace) -> None:
    """Trains as one method, in turns with others."""
    case, _ = case_of(given.case, given.trial)
    with contextlib.suppress(Finished), contextlib.redirect_stdout(sys.stderr):
        METHODS[given.method](Pace(given.device, given.block), case)


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "table", "work"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block", type=int, default=5, help="steps between two turns")
    parser.add_argument("--only", default="", help="cases that contain this text; nothing is kept")
    parser.add_argument("--trial", action="store_true", help="tiny models; nothing is kept")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trial:
        given.rounds = min(given.rounds, 2)
    {"measure": measure, "table": lambda g: write_page(g.device), "work": work}[given.command](
        given
    )


if __name__ == "__main__":
    main()
