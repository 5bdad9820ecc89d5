"""Everything that only a GPU can tell, in one call of at most eight minutes, without a network.

``python benchmarks/gpu/run.py`` runs the parts of :data:`PARTS`, the most valuable first, and
writes ``benchmarks/records/gpu.json`` after each measurement. A part that fails does not stop the
rest; one for which too little time is left is noted as skipped. Called again, it takes up only what
is missing or failed (``--again`` measures all). ``--prepare`` makes the planner's predictions
beforehand, which need no GPU. ``--table`` writes the tables of ``docs/performance.md`` from the
record.

``--device cpu --tiny`` tries all of it on next to nothing, and writes ``gpu.quick.json``.

A machine without packages: ``pip install --target FOLDER --no-deps bitsandbytes peft trl
accelerate`` elsewhere, and put FOLDER on PYTHONPATH. Of bitsandbytes' libraries only the one of the
CUDA version and the one of the CPU are needed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parents[1])]

from record import RECORDS, conditions, synchronize, write_between  # noqa: E402

SECONDS = 460


class Kit:
    """What a part needs, and the record: each part in it maps its rows to their numbers.

    ``seconds`` are those of all parts together; ``tiny`` runs next to nothing.
    """

    def __init__(self, device: str, tiny: bool, seconds: float, path: Path) -> None:
        self.device, self.tiny, self.path = device, tiny, path
        self.ends = time.monotonic() + seconds
        self.record: dict[str, Any] = {"quick": tiny, "device": device, "parts": {}}

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.ends - time.monotonic()

    def resume(self) -> None:
        """Takes up the record of an earlier call on the same device."""
        if self.path.is_file():
            known = json.loads(self.path.read_text(encoding="utf-8"))
            if (known["quick"], known["device"]) == (self.tiny, self.device):
                self.record = known

    def write(self) -> None:
        """Writes the record, whole or not at all."""
        self.path.parent.mkdir(exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)

    def row(self, part: str, name: str, needed: float, measure: Callable[[], Any]) -> Any:
        """Returns the numbers of one row: those of an earlier call, else measured now.

        ``needed`` are seconds on a large GPU. What fails is noted, and so is what has no time.
        """
        rows = self.record["parts"].setdefault(part, {})
        known = rows.get(name)
        if known is not None and not {"failed", "skipped"} & known.keys():
            return known
        began = time.monotonic()
        if self.left < needed:
            rows[name] = {"skipped": f"{self.left:.0f} s left, about {needed:g} s needed"}
        else:
            try:
                rows[name] = {**measure(), "took": round(time.monotonic() - began, 1)}
            except Exception as error:
                # Of the libraries that are measured anything may be raised; the rest is to run.
                first = (str(error).strip().splitlines() or [""])[0]
                rows[name] = {"failed": f"{type(error).__name__}: {first[:300]}"}
            self.free()
        self.write()
        print(f"[{self.left:4.0f} s left] {part}: {name}: {json.dumps(rows[name])}", flush=True)
        return rows[name]

    def free(self) -> None:
        """Gives memory of what is gone back to the device."""
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def wait(self) -> None:
        """Waits for the device."""
        synchronize(self.device)

    def seconds(self, function: Callable[[], Any], repeats: int) -> float:
        """Returns the seconds of one call: the mean of ``repeats`` after one to warm up."""
        function()
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        self.wait()
        return (time.perf_counter() - began) / repeats


def machine(kit: Kit) -> None:
    """Notes the machine; it is not a part, and is written with every call."""
    import torch

    found = conditions()
    if kit.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        found |= {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "total_bytes": total,
            "free_bytes": free,
        }
    kit.record["conditions"] = found


def parts() -> dict[str, Callable[[Kit], None]]:
    """Returns the parts by name, the most valuable first."""
    import devices
    import ladder
    import libraries

    return {
        "ceilings": devices.ceilings,
        "agreement": devices.agreement,
        "steps": ladder.steps,
        "optimizers": devices.optimizers,
        "waits": devices.waits,
        "tests": libraries.tests,
        "peers": ladder.peers,
        "loading": libraries.loading,
        "paging": devices.paging,
    }


PARTS = (
    "ceilings", "agreement", "steps", "optimizers", "waits", "tests", "peers", "loading", "paging",
)  # fmt: skip


def main(words: list[str] | None = None) -> Kit:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="next to nothing, to try all of it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="some parts")
    parser.add_argument("--again", action="store_true", help="measure what is known as well")
    parser.add_argument("--prepare", action="store_true", help="predict only; needs no GPU")
    parser.add_argument("--table", action="store_true", help="write the tables of the docs")
    parser.add_argument("--record", type=Path, help="the record's file")
    given = parser.parse_args(words)
    name = "gpu.quick.json" if given.tiny else f"gpu{'_cpu' * (given.device == 'cpu')}.json"
    kit = Kit(given.device, given.tiny, given.seconds, given.record or RECORDS / name)
    if not given.again:
        kit.resume()
    if given.table:
        import tables

        write_between("gpu", "\n".join(tables.lines(kit.record)))
        return kit
    if given.prepare:
        import ladder

        ladder.predictions(kit)
        return kit
    machine(kit)
    for name, part in parts().items():
        if name in given.only:
            part(kit)
    kit.write()
    return kit


if __name__ == "__main__":
    main()
