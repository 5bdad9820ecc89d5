"""Writes ``questions.jsonl`` next to this file, from the questions that come with the package.

A row is a question and the answer that rewards compare with.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
QUESTIONS = HERE.parents[2] / "lightning_peft" / "demo" / "instructions.jsonl"
COUNT, VALIDATION = 192, 32


def rows() -> list[dict[str, str]]:
    """Returns every third question, the last ones for validation."""
    asked = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "prompt": row["prompt"],
            "expected": row["response"],
            "split": "validation" if place >= COUNT - VALIDATION else "train",
        }
        for place, row in enumerate(asked[::3][:COUNT])
    ]


def main() -> None:
    """Writes the same file each time."""
    lines = [json.dumps(row) + "\n" for row in rows()]
    (HERE / "questions.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
