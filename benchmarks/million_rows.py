"""A million chat rows: how fast they are prepared, in what memory, and what is found or resumed.

``python benchmarks/million_rows.py [--rows N] [--small N] [--repeats N] [--quick]`` writes made-up
conversations and prepares them in fresh processes. ``ours`` is the preparation of
:class:`SupervisedData` with two worker processes; ``trl`` is what ``SFTTrainer`` tokenizes the same
file with, by ``datasets.map`` in two processes, for the loss of answers only. Both prepare the
smaller file in turns, with an empty cache. ``all`` prepares the larger file once, ``cached`` finds
it again, and ``resumed`` finishes a preparation that was killed by SIGKILL when half of its parts
were written. Memory is the largest sum over the process and its children of the proportional set
size, which counts pages that processes share once, sampled twice a second; without the pages of
files that are mapped, which the system takes back when it needs them. Times start after the imports
and the tokenizer. The record is ``benchmarks/records/million_rows.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from data_path import write_rows
from encoding_with_datasets import data_of, encode_with_trl
from loading_memory import Sampler
from record import (
    conditions,
    interleaved,
    ratio,
    run_script,
    spread,
    summary,
    with_empty_cache,
    write,
)

PROCESSES = 2
SAMPLE_SECONDS = 0.5


class PeakMemory(Sampler):
    """The most memory of this process and its children."""

    peak = 0

    def look(self) -> None:
        """Samples it."""
        this, total = psutil.Process(), 0
        for process in [this, *this.children(recursive=True)]:
            with suppress(psutil.Error, OSError):
                total += anonymous_bytes(process.pid)
        self.peak = max(self.peak, total)


def anonymous_bytes(pid: int) -> int:
    """Returns the proportional bytes of a process that no file is mapped to."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    found = dict(line.split(":") for line in text.splitlines()[1:] if ":" in line)
    return sum(int(found[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem")) << 10


def prepare(who: str, file: Path, cache: Path) -> None:
    """Prepares in this process, and prints seconds, peak and rows."""
    from lightning_peft.data import preparation

    preparation.usable_cores = lambda: PROCESSES
    data = data_of(who, file, cache)
    with PeakMemory(SAMPLE_SECONDS) as memory:
        started = time.perf_counter()
        if who == "trl":
            rows = len(encode_with_trl(data, PROCESSES, cache))
        else:
            rows = sum(map(len, data.read().splits.values()))
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": memory.peak, "rows": rows}))


def words_of(who: str, file: Path) -> tuple[str, ...]:
    """Returns the arguments with which this script prepares, but for the cache."""
    return ("--who", who, "--file", str(file))


def killed(file: Path, cache: Path, parts: int) -> None:
    """Kills a preparation once so many parts are written."""
    script = subprocess.Popen(
        [sys.executable, __file__, *words_of("ours", file), "--cache", str(cache)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
    )
    last = f"{parts - 1:06}"
    try:
        while not list(cache.glob(f"ours/.*-parts/{last}")):
            if script.poll() is not None:
                raise RuntimeError("the preparation ended before it was killed")
            time.sleep(0.05)
    finally:
        script.kill()
        script.wait()


def measure(rows: int, small: int, repeats: int) -> dict[str, Any]:
    """Returns the measurements and their ratios."""
    from lightning_peft.data.prepared_parts import PART_ROWS

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        write_rows(few, small)
        write_rows(many, rows)
        names = ("ours", "trl") if find_spec("trl") else ("ours",)
        ways = {who: with_empty_cache(__file__, folder, *words_of(who, few)) for who in names}
        runs = interleaved(ways, repeats)
        words = (*words_of("ours", many), "--cache")
        for way in ("all", "cached"):
            runs[way] = [run_script(__file__, *words, str(folder / "kept"))]
            print(f"{way}: {runs[way]}", flush=True)
        parts = max(1, rows // PART_ROWS // 2)
        killed(many, folder / "killed", parts)
        runs["resumed"] = [run_script(__file__, *words, str(folder / "killed"))]
    assert all(run["rows"] == small for who in names for run in runs[who])
    assert {run["rows"] for way in ("all", "cached", "resumed") for run in runs[way]} == {rows}
    growth = runs["all"][0]["peak_bytes"] - min(run["peak_bytes"] for run in runs["ours"])
    ratios = {
        f"rows a second, ours, {small:,} rows": spread(
            [small / r["seconds"] for r in runs["ours"]]
        ),
        f"rows a second, ours, {rows:,} rows": spread([rows / r["seconds"] for r in runs["all"]]),
        "peak memory: all rows / few rows": spread(
            [runs["all"][0]["peak_bytes"] / run["peak_bytes"] for run in runs["ours"]]
        ),
        "bytes of peak memory for each further row": spread([growth / max(1, rows - small)]),
        "seconds to find all rows in the cache": spread([r["seconds"] for r in runs["cached"]]),
        "rows in finished parts / all": spread([parts * PART_ROWS / rows]),
        "resumed / all, seconds": ratio(runs, "resumed", "all", "seconds"),
    }
    if "trl" in runs:
        ratios["ours / trl, seconds"] = ratio(runs, "ours", "trl", "seconds")
        ratios["ours / trl, peak memory"] = ratio(runs, "ours", "trl", "peak_bytes")
    return {"measured": summary(runs), "ratios": ratios, "runs": runs}


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--who", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.who:
        prepare(given.who, given.file, given.cache)
        return
    where = conditions()
    # Two parts, of which one is finished when it is killed.
    sizes = (17_000, 2_000, 1) if given.quick else (given.rows, given.small, given.repeats)
    content = {"rows": sizes[0], "small": sizes[1], "processes": PROCESSES, **measure(*sizes)}
    write("million_rows", {"conditions": where, **content}, quick=given.quick)


if __name__ == "__main__":
    main()
