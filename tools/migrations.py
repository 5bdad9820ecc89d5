"""Runs each pair of docs/migrations and writes what it gave: `python tools/migrations.py`.

The table on the page, between its marks, is made of docs/migrations/results.json.
"""

from __future__ import annotations

import io
import json
import runpy
import sys
import tempfile
import tokenize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1] / "docs" / "migrations"
PAGE = ROOT.parent / "migrating.md"
RECORD = ROOT / "results.json"
KINDS = ("multimodal", "protein", "encoder", "remote_sensing", "retrieval", "speech")
MARKS = ("<!-- migrations: begin -->", "<!-- migrations: end -->")


def run(kind: str, side: str) -> dict[str, Any]:
    """Runs one file; returns its loss, the bytes of what it saved, and its lines of code."""
    file = ROOT / kind / f"{side}.py"
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loss = runpy.run_path(str(file))["main"](folder)
        # An adapter folder next to a checkpoint holds the same values again.
        saved = list(folder.rglob("*.ckpt")) or list(folder.rglob("*.safetensors"))
        size = max(path.stat().st_size for path in saved)
    return {"loss": loss, "bytes": size, "lines": lines_of_code(file)}


def lines_of_code(file: Path) -> int:
    """Returns how many lines have code on them, without comments and docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    text = file.read_text(encoding="utf-8")
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        documents = token.type == tokenize.STRING and previous in skipped
        if token.type not in {*skipped, tokenize.ENDMARKER} and not documents:
            lines |= set(range(token.start[0], token.end[0] + 1))
        previous = token.type
    return len(lines)


def table(results: dict[str, Any]) -> str:
    """Returns the table of the page."""
    rows = [
        "| kind | validation loss | checkpoint, KB | lines of code |",
        "| --- | --- | --- | --- |",
    ]
    for kind, sides in results.items():
        before, after = sides["before"], sides["after"]
        rows.append(
            f"| {kind} "
            f"| {before['loss']:.3f} to {after['loss']:.3f} "
            f"| {before['bytes'] / 1e3:.0f} to {after['bytes'] / 1e3:.0f} "
            f"| {before['lines']} to {after['lines']} |"
        )
    return "\n".join(rows)


def page_with(results: dict[str, Any]) -> str:
    """Returns the page with the table of ``results``."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = (text.index(mark) for mark in MARKS)
    return f"{text[: start + len(MARKS[0])]}\n{table(results)}\n{text[end:]}"


def main() -> None:
    """Runs all, and writes record and page."""
    results = {kind: {side: run(kind, side) for side in ("before", "after")} for kind in KINDS}
    RECORD.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page_with(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
