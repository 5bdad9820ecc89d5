"""Training steps of this project against those of its peers and against the floor.

``python benchmarks/training_step.py measure [--device cuda] [--rounds N] [--only CASE]`` runs every
case of :data:`CASES` with each of its methods in a process of its own. All processes of a case are
alive at once, and take turns: one block of steps each, in an order that changes with every round,
so that a machine that gets slower does so for all. One step warms up. Afterwards each method takes
one more step alone for its peak memory (on the CPU the bytes of torch's allocator, on a GPU
``torch.cuda.max_memory_allocated``), and the rungs of the ladder one more under torch's profiler.
A method whose package is not installed is skipped, which the record notes.

The record is ``records/training_step.json``, of a GPU ``records/training_step_cuda.json``.
``--quick`` runs tiny models for one round, to see that all of it works; ``--check`` runs few real
steps of the cases in :data:`CHECKED`, for ``all.py check``. ``python benchmarks/training_step.py
table`` writes the tables into ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import Any

from record import conditions, device_name, read, record_name, spread, write, write_between
from training_case import Case, Finished, Pace
from training_methods import METHODS
from training_tables import tables

NEEDS = {"trl": "trl", "trl packed": "trl", "hugging face": "accelerate"}
STEP = ("engine", "layers", "strategy", "by hand", "floor")
# One change each; the recipe is the last one under the Trainer.
LADDER = ("by hand", "layers", "engine", "labelled", "packed", "checkpointed")

# With the steps of a block.
CASES: list[tuple[Case, tuple[str, ...], int]] = [
    *(
        (Case(f"{name}, dropout {p:g}", "40M", name == "QLoRA", p, rows=2, length=256), STEP, 3)
        for name in ("QLoRA", "LoRA")
        for p in (0.0, 0.05)
    ),
    (
        Case("instructions", "40M", True, rows=8, length=1024, data="instructions"),
        (*LADDER, "recipe", "trl", "trl packed"),
        2,
    ),
    (
        Case("wide vocabulary", "wide vocabulary", True, rows=1, length=1024, data="prompts"),
        ("recipe", "hugging face"),
        2,
    ),
]
CHECKED: list[tuple[Case, tuple[str, ...], int]] = [
    (CASES[0][0], STEP, 3),
    (
        Case("instructions", "40M", True, rows=4, length=256, data="instructions"),
        ("recipe", "by hand"),
        2,
    ),
]
# Ratios: case, method, other, measure.
RATIOS: list[tuple[str, str, str, str]] = [
    *(
        (f"{name}, dropout {p:g}", "engine", "by hand", measure)
        for name in ("QLoRA", "LoRA")
        for p in (0.0, 0.05)
        for measure in ("seconds", "peak")
    ),
    *(
        (f"{name}, dropout {p:g}", "layers", "by hand", "seconds")
        for name in ("QLoRA", "LoRA")
        for p in (0.0, 0.05)
    ),
    *((f"{name}, dropout 0", "engine", "floor", "seconds") for name in ("QLoRA", "LoRA")),
    *((f"{name}, dropout 0", "strategy", "engine", "seconds") for name in ("QLoRA", "LoRA")),
    *(
        ("instructions", "recipe", other, measure)
        for other in ("trl", "trl packed", "by hand")
        for measure in ("seconds per token", "peak")
    ),
    ("wide vocabulary", "recipe", "hugging face", "peak"),
]


class Worker:
    """One method of a case, in a process of its own, which ``command`` starts."""

    def __init__(self, method: str, command: list[str]) -> None:
        self.method = method
        # A file: nobody reads here while the process runs.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *command],
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
        lines = [line for line in self.errors if line.strip()] or ["no message"]
        raise RuntimeError(f"{self.method}: {lines[-1].strip()}")

    def end(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self.errors.close()


def measure_case(number: int, given: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of one case."""
    case, methods, block = case_of(number, given)
    missing = [m for m in methods if m in NEEDS and importlib.util.find_spec(NEEDS[m]) is None]
    found: dict[str, Any] = {method: {"skipped": f"no {NEEDS[method]}"} for method in missing}
    workers = [
        Worker(method, words_of(number, method, given))
        for method in methods
        if method not in missing
    ]
    try:
        for worker in workers:
            losses = worker.ask("block 1")["losses"]
            found[worker.method] = {"blocks": [], "tokens": [], "losses": losses}
        for turn in range(given.rounds):
            first = turn % len(workers)
            for worker in [*workers[first:], *workers[:first]]:
                answer, record = worker.ask(f"block {block}"), found[worker.method]
                record["blocks"].append(statistics.median(answer["seconds"]))
                record["tokens"].append(answer["tokens"] / sum(answer["seconds"]))
                record["losses"] += answer["losses"]
            print(f"{case.name}: round {turn + 1} of {given.rounds}", file=sys.stderr, flush=True)
        for worker in workers:
            found[worker.method]["peak"] = worker.ask("memory")["peak"]
            if worker.method in LADDER:
                found[worker.method]["profile"] = worker.ask("profile")
    finally:
        for worker in workers:
            worker.end()
    return {"case": case.name, "methods": found}


def words_of(case: int, method: str, given: argparse.Namespace) -> list[str]:
    """Returns the words of the command that trains as a method of a case."""
    words = ["--device", given.device, "--case", str(case), "--method", method]
    more = [f"--{word}" for word in ("quick", "check") if getattr(given, word)]
    return [__file__, "work", *words, *more]


def cases_of(given: argparse.Namespace) -> list[tuple[Case, tuple[str, ...], int]]:
    """Returns the cases with their methods and the steps of a block."""
    return CHECKED if given.check else CASES


def case_of(number: int, given: argparse.Namespace) -> tuple[Case, tuple[str, ...], int]:
    """Returns a case; of a smoke run, with a tiny model and few tokens."""
    case, methods, block = cases_of(given)[number]
    if given.quick:
        return replace(case, size="tiny", length=min(case.length, 64)), methods, block
    return case, methods, block


def ratios(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the spread of every ratio, round by round."""
    by_name = {entry["case"]: entry["methods"] for entry in cases}
    found = {}
    for case, method, other, measure in RATIOS:
        pair = [by_name.get(case, {}).get(name, {"skipped": ""}) for name in (method, other)]
        if any("skipped" in record for record in pair):
            continue
        mine, theirs = (values(record, measure) for record in pair)
        found[f"{case}: {method} / {other}, {measure}"] = spread(
            [a / b for a, b in zip(mine, theirs, strict=True)]
        )
    return found


def values(record: dict[str, Any], measure: str) -> list[float]:
    """Returns the measurements of a method in each round; a peak is measured once."""
    if measure == "peak":
        return [float(record["peak"])]
    if measure == "seconds per token":
        return [1 / tokens for tokens in record["tokens"]]
    return list(record["blocks"])


def measure(given: argparse.Namespace) -> None:
    """Runs the cases and writes the record after each."""
    where: dict[str, Any] = {**conditions(), "rounds": given.rounds}
    if given.device == "cuda":
        where["device"] = device_name("cuda")
    done: list[dict[str, Any]] = []
    for number, (case, _, _) in enumerate(cases_of(given)):
        if given.only not in case.name:
            continue
        done.append(measure_case(number, given))
        content = {"conditions": where, "ratios": ratios(done), "cases": done}
        quick, name = given.quick or bool(given.only), record_name("training_step", given.device)
        write(name, content, quick=quick, check=given.check)
    print("\n".join(tables(content, LADDER)))


def table(device: str) -> None:
    """Writes the tables of a device's record into the page."""
    content = read(record_name("training_step", device))
    if content is not None:
        write_between(f"{device} training step", "\n".join(tables(content, LADDER)))


def work(given: argparse.Namespace) -> None:
    """Trains as one method, in turns with others."""
    case, _, _ = case_of(given.case, given)
    with contextlib.suppress(Finished), contextlib.redirect_stdout(sys.stderr):
        METHODS[given.method](Pace(given.device), case)


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "table", "work"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases that contain this text")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--check", action="store_true", help="few steps of some cases")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.rounds = 1
    if given.command == "table":
        table(given.device)
        return
    {"measure": measure, "work": work}[given.command](given)


if __name__ == "__main__":
    main()
