"""Conditions of a measurement, and the format of its record."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
PAGE = RECORDS.parent.parent / "docs" / "performance.md"
# Arguments of a Trainer that does nothing but train.
QUIET: dict[str, Any] = {
    "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip
# Measures once.
Way = Callable[[], Mapping[str, float]]
PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "pytorch-lightning", "safetensors", "trl",
)  # fmt: skip


def conditions() -> dict[str, Any]:
    """Returns the machine and the versions, without a name of the machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _commit() -> str | None:
    """Returns the commit that is measured; ``+`` is for what is not committed."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=RECORDS.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def format_conditions(where: Mapping[str, Any]) -> str:
    """Returns conditions as one sentence."""
    flat = {**where, **where.get("versions", {})}
    flat.pop("versions", None)
    return "; ".join(f"{k} {v}".replace("_", " ") for k, v in flat.items() if v is not None) + "."


def interleaved(ways: Mapping[str, Way], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Runs every way once, then every way once more, and so on.

    Other load on the machine then falls on all of them alike.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(repeats):
        # Not always in the same order: who comes second may find warm files.
        for name in names if turn % 2 == 0 else names[::-1]:
            found[name].append(dict(ways[name]()))
            print(f"{turn + 1}/{repeats} {name}: {found[name][-1]}", flush=True)
    return found


def run_script(script: str, *words: str, **environment: str) -> dict[str, float]:
    """Runs a script in a fresh process, offline, and returns the JSON object that it prints last.

    Raises:
        RuntimeError: If it fails, with the last line of its error output.
    """
    done = subprocess.run(
        [sys.executable, script, *words],
        env={**os.environ, **environment, "HF_HUB_OFFLINE": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr.strip().splitlines() or ['-'])[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def smollm2_file() -> Path:
    """Returns the file of SmolLM2-135M-Instruct; ends this process where there is none."""
    from lightning_peft.demo.exercises import absence_of_smollm2, smollm2

    found, missing = smollm2(), absence_of_smollm2()
    if found is None or missing:
        raise SystemExit(f"The model is missing: {missing}")
    return found


def run_command(folder: Path, *words: str) -> dict[str, Any]:
    """Runs a command of the package in a folder, and returns the result that it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft.cli", *words, "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout))


def with_empty_cache(script: str, folder: Path, *words: str, **environment: str) -> Way:
    """Returns a function that runs a script in a fresh process, with an empty ``--cache``."""

    def run() -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            return run_script(script, *words, "--cache", cache, **environment)

    return run


def synchronize(device: str) -> None:
    """Waits for what was started on a GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def timed(step: Callable[[], Any], device: str, steps: int = 1) -> Way:
    """Returns a function that takes some steps, and returns the median of their seconds."""

    def run() -> Mapping[str, float]:
        times = []
        for _ in range(steps):
            synchronize(device)
            started = time.perf_counter()
            step()
            synchronize(device)
            times.append(time.perf_counter() - started)
        return {"seconds": statistics.median(times)}

    return run


def device_name(device: str) -> str:
    """Returns the name of ``"cpu"`` or ``"cuda"`` for people."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def record_name(script: str, device: str) -> str:
    """Returns the name of a script's record of a device."""
    return script if device == "cpu" else f"{script}_{device}"


def markdown(header: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns the lines of a table; ``header`` has its columns between bars."""
    columns = header.count("|") + 1
    lines = [f"| {header} |", "| " + " | ".join(["---"] * columns) + " |"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


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


def ratio_table(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns the table of the ratios of a record."""
    parts = ("median", "min", "max")
    rows = [[name, *(f"{found[part]:.3f}" for part in parts)] for name, found in ratios.items()]
    return markdown("ratio | median | from | to", rows)


def write(name: str, content: dict[str, Any], *, quick: bool, check: bool = False) -> Path:
    """Writes a record; one of a smoke run or of a check never takes the place of a real one."""
    RECORDS.mkdir(exist_ok=True)
    kind = ".quick" if quick else ".check" if check else ""
    path = RECORDS / f"{name}{kind}.json"
    path.write_text(json.dumps({"quick": quick, **content}, indent=1) + "\n", encoding="utf-8")
    print(path.relative_to(RECORDS.parent.parent), flush=True)
    return path


def read(name: str) -> dict[str, Any] | None:
    """Returns a record, or ``None`` where there is none."""
    path = RECORDS / f"{name}.json"
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read_to_add(name: str) -> dict[str, Any] | None:
    """Returns a record that figures are added to, or ``None`` where there is none.

    Raises:
        SystemExit: If it is of another machine or torch: its conditions stand above all figures.
    """
    content = read(name)
    if content is not None:
        then, now = (
            f"{where['cpu']}, {where['cores']} cores, torch {where['versions'].get('torch')}"
            for where in (content["conditions"], conditions())
        )
        if then != now:
            raise SystemExit(
                f"The record is of {then}, and this is {now}: measure all of it here, after "
                f"moving {name}.json of {RECORDS.name} away."
            )
    return content


def write_between(name: str, text: str, page: Path = PAGE) -> None:
    """Puts ``text`` between the marks called ``name`` in a page."""
    begin, end = f"<!-- {name} begins -->", f"<!-- {name} ends -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no marks {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
