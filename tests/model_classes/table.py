"""The table of docs/model-classes.md: `cd tests; python -m model_classes.table` writes it."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers

from model_classes.reasons import NOT_TRIED
from model_classes.rows import KINDS, Row, rows, run

PAGE = Path(__file__).parents[2] / "docs" / "model-classes.md"
START, END = "<!-- table -->", "<!-- end of the table -->"


def result(row: Row) -> Row:
    """Returns ``row`` with what became of it."""
    row.lora, row.qlora = run(row, "lora"), run(row, "qlora")
    return row


def text(found: list[Row]) -> str:
    """Returns the tables, by kind."""
    parts = []
    for kind in KINDS:
        mine = [row for row in found if row.kind == kind]
        if not mine:
            continue
        parts += [f"\n## {kind[0].upper()}{kind[1:]}: {len(mine)} classes\n"]
        parts += ["| class | layers | LoRA | QLoRA |", "| --- | --- | --- | --- |"]
        for row in sorted(mine, key=lambda row: row.name):
            cells = [cell.partition(". ")[0].replace("|", "/") for cell in (row.lora, row.qlora)]
            parts.append(f"| {row.name} | {row.layers} | {cells[0]} | {cells[1]} |")
    absent = sorted((name, reason) for name, reason in NOT_TRIED.items())
    parts += ["\n## Not tried\n", "| class | why |", "| --- | --- |"]
    parts += [f"| {name} | {reason} |" for name, reason in absent]
    return "\n".join(parts).strip()


def write(found: list[Row]) -> None:
    """Puts the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    head, tail = page.partition(START)[0], page.partition(END)[2]
    PAGE.write_text(f"{head}{START}\n\n{text(found)}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = []
    for row in rows():
        if row.name not in NOT_TRIED:
            found.append(result(row))
            print(row.name, row.lora, row.qlora, flush=True)
    write(found)


if __name__ == "__main__":
    sys.exit(main())
