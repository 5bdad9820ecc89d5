"""Writes ``docstrings.jsonl`` next to this file, from the questions that come with the package.

A row is what a docstring says, and the label is the package that it is from.
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
QUESTIONS = HERE.parents[2] / "lightning_peft" / "demo" / "instructions.jsonl"
PACKAGES = ("asyncio", "decimal", "email", "mailbox", "tkinter", "xml")


def rows() -> list[dict[str, str]]:
    """Returns the summaries of these packages, each text once, in the order of the questions."""
    label_of: dict[str, str] = {}
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        asked = json.loads(line)
        name = re.match(r"What (?:does|is) [^`]*`(\w+)", asked["prompt"])
        if name and name[1] in PACKAGES:
            label_of.setdefault(asked["response"], name[1])
    return [{"text": text, "label": label} for text, label in label_of.items()]


def main() -> None:
    """Writes the same file each time."""
    lines = [json.dumps(row) + "\n" for row in rows()]
    (HERE / "docstrings.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
