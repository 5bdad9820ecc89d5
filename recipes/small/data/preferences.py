"""Writes ``preferences.jsonl`` next to this file, from the questions that come with the package.

The chosen answer is the true one. The rejected one is that of another question in every second row,
and else the true one with its words in another order.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
QUESTIONS = HERE.parents[2] / "lightning_peft" / "demo" / "instructions.jsonl"
COUNTS = {"train": 180, "validation": 60}


def main() -> None:
    """Writes the same file each time."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    asked = [row for row in map(json.loads, lines) if row["prompt"].startswith("What does")]
    drawn = random.Random(0)
    with (HERE / "preferences.jsonl").open("w", encoding="utf-8") as file:
        for split, count in COUNTS.items():
            rows = [r for r in asked if r["split"] == split and 5 < len(r["response"].split()) < 25]
            rows = drawn.sample(rows, count)
            for place, row in enumerate(rows):
                words = row["response"].split()
                drawn.shuffle(words)
                other = rows[place - 1]["response"] if place % 2 else " ".join(words)
                pair = {"prompt": row["prompt"], "chosen": row["response"], "rejected": other}
                file.write(json.dumps({**pair, "split": split}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
