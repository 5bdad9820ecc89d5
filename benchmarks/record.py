"""What every benchmark writes beside its numbers, and how it writes them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "pytorch-lightning", "safetensors")


def conditions() -> dict[str, Any]:
    """Returns the machine and the versions, without a name of the machine."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def interleaved(
    ways: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int
) -> dict[str, list[dict[str, float]]]:
    """Runs every way once, then every way once more, and so on.

    What the machine does besides then falls on all of them alike.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(repeats):
        # Not always in the same order: who comes second may find warm files.
        for name in names if turn % 2 == 0 else names[::-1]:
            found[name].append(dict(ways[name]()))
            print(f"{turn + 1}/{repeats} {name}: {found[name][-1]}", flush=True)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, smallest and largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(
    runs: Mapping[str, Sequence[Mapping[str, float]]], one: str, other: str, measure: str
) -> dict[str, float]:
    """Returns the spread of the ratio of two ways, turn by turn."""
    return spread([a[measure] / b[measure] for a, b in zip(runs[one], runs[other], strict=True)])


def summary(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Returns the spread of every measure of every way."""
    return {
        way: {measure: spread([run[measure] for run in turns]) for measure in turns[0]}
        for way, turns in runs.items()
    }


def write(name: str, content: dict[str, Any], *, quick: bool) -> Path:
    """Writes a record; a smoke run never takes the place of a real one."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / (f"{name}.quick.json" if quick else f"{name}.json")
    path.write_text(json.dumps({"quick": quick, **content}, indent=1) + "\n", encoding="utf-8")
    print(path.relative_to(RECORDS.parent.parent))
    return path
