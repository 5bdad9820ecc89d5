"""All measurements, one after the other, and the tables of ``docs/performance.md``.

``python benchmarks/all.py`` runs every script of :data:`SCRIPTS` and writes the tables from their
records. ``--quick`` tries the scripts on next to nothing and writes no table; ``--check`` measures
a few ratios in about two minutes and fails where one is above its bound in ``targets.py``;
``--table`` only writes the tables. ``--only NAME`` runs one script. ``--second-base FOLDER`` is a
pretrained model of another family for ``quality.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from record import conditions, format_conditions, ratio_table, read, write_between
from targets import broken, summary

HERE = Path(__file__).parent
# Script, arguments of `measure`, about how many minutes it takes on two cores of a quiet machine,
# and arguments for a check (None: it has none).
SCRIPTS: tuple[tuple[str, tuple[str, ...], float, tuple[str, ...] | None], ...] = (
    ("startup", ("--repeats", "5"), 2, ("--check",)),
    ("checkpoints", (), 5, ("--check",)),
    ("training_step", ("measure",), 11, ("measure", "--check", "--rounds", "3")),
    ("generation", ("measure",), 4, ("measure", "--check", "--rounds", "3")),
    ("real_step", ("measure",), 8, None),
    ("base_loading", (), 3, ("--check", "--repeats", "2")),
    ("data_path", (), 5, None),
    ("encoding_with_datasets", (), 15, None),
    ("million_rows", (), 35, None),
    ("scaling", ("measure",), 5, None),
    ("activation_budget", ("measure",), 3, None),
    ("selective_checkpointing", (), 5, None),
    ("linear_cross_entropy", (), 3, None),
    ("prequantized_folder", (), 3, None),
    ("process_memory", ("measure",), 15, None),
    ("quality", (), 30, None),
    ("real_quality", (), 150, None),
)
# Scripts that write tables of their own.
TABLES = (
    *("training_step", "real_step", "generation", "scaling", "activation_budget"),
    "process_memory",
    "real_quality",
)


def run(name: str, words: tuple[str, ...]) -> bool:
    """Runs one script and returns whether it succeeded."""
    started = time.monotonic()
    code = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), *words], check=False
    ).returncode
    print(f"{name}: {time.monotonic() - started:.0f} s, exit code {code}", flush=True)
    return code == 0


def present(name: str) -> bool:
    """Returns whether there is a script of this name."""
    return (HERE / f"{name}.py").is_file()


def tables() -> list[str]:
    """Writes all tables; returns the scripts that failed to write theirs."""
    write_between("summary", "\n".join(summary()))
    write_between("other records", "\n".join(others()))
    failed = [name for name in TABLES if read(name) is not None and not run(name, ("table",))]
    return failed if run("gpu/run", ("--table",)) else [*failed, "gpu/run"]


def others() -> list[str]:
    """Returns the ratios of the records that have no page of their own, with their conditions."""
    lines: list[str] = []
    for name, *_ in SCRIPTS:
        content = read(name)
        if name in TABLES or content is None:
            continue
        found = content.get("ratios") or content.get("shipped_base", {}).get("ratios", {})
        lines += [f"`{name}`: {format_conditions(content['conditions'])}", ""]
        named = {ratio.replace("_", " "): values for ratio, values in found.items()}
        lines += [*ratio_table(named), ""]
        phases = content.get("seconds", {}).get("first_step")
        if phases is not None:
            whole, *parts = ((phase, values["median"]) for phase, values in phases.items())
            shares = ", ".join(f"{phase} {median}" for phase, median in parts)
            lines += [
                f"From the command to the end of the first step of SmolLM2, with the recipe's "
                f"defaults: {whole[1]} s, median of {content['repeats']}. Of these: {shares}.",
                "",
            ]
    return lines[:-1] or ["Not measured yet."]


def main() -> None:
    """Measures, checks or writes; the exit code is 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="try the scripts; no tables")
    parser.add_argument("--check", action="store_true", help="a few ratios against their bounds")
    parser.add_argument("--table", action="store_true", help="write the tables from the records")
    parser.add_argument("--only", choices=[name for name, *_ in SCRIPTS], help="one script")
    parser.add_argument("--second-base", help="a model of another family, for quality.py")
    given = parser.parse_args()
    failed: list[str] = []
    busy = conditions()["load_at_start"]
    if busy > 0.5 and not (given.quick or given.table):
        print(f"warning: the machine is busy already (load {busy}); the numbers will be wrong")
    for name, words, minutes, checked in SCRIPTS:
        skipped = given.check and checked is None
        if given.table or skipped or not present(name) or given.only not in (None, name):
            continue
        if given.check:
            words = checked or ()
        elif given.quick:
            words = tuple(word for word in words if word == "measure") + ("--quick",)
        else:
            if name == "quality" and given.second_base:
                words, minutes = (*words, "--model", given.second_base), 2 * minutes
            print(f"{name}: about {minutes:g} minutes", flush=True)
        if not run(name, words):
            failed.append(name)
    if given.check:
        failed += broken()
    elif not given.quick:
        failed += tables()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
