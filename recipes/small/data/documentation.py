"""Writes ``documentation.jsonl`` next to this file, from the questions that come with the package.

A row is a question about a function, class or module of Python, what its documentation says, and
what it says of one or two others of the same package. No text is the answer of two rows, and no
text of a validation row is in another one, not even as a negative.
"""

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUESTIONS = HERE.parents[2] / "lightning_peft" / "demo" / "instructions.jsonl"
ASKED = re.compile(r"What (?:does `(?P<a>.+)` do|is `(?P<b>.+)`|is the `(?P<c>.+)` module for)\?")
ROWS, VALIDATION, NEGATIVES = 800, 200, 2


def digest(text: str) -> str:
    """Returns the key by which rows are ordered and drawn."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def rows() -> list[dict[str, Any]]:
    """Returns the rows, those for validation last."""
    answer_of: dict[str, tuple[str, str]] = {}
    seen: set[str] = set()
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        asked = json.loads(line)
        found = ASKED.fullmatch(asked["prompt"])
        if found and asked["response"] not in seen:
            seen.add(asked["response"])
            name = next(filter(None, found.groups()))
            answer_of.setdefault(name, (asked["prompt"], asked["response"]))
    packages = defaultdict(list)
    for name in answer_of:
        packages[name.partition(".")[0]].append(name)
    names = [n for n in answer_of if len(packages[n.partition(".")[0]]) > 10 * NEGATIVES]
    names = sorted(names, key=digest)[:ROWS]
    split_of = {n: "train" if i < ROWS - VALIDATION else "validation" for i, n in enumerate(names)}
    made = []
    for name in names:
        question, answer = answer_of[name]
        # Not even as a negative is a text of one split in the other.
        others = [
            other
            for other in packages[name.partition(".")[0]]
            if other != name and split_of.get(other) == split_of[name]
        ]
        others = sorted(others, key=lambda other: digest(name + other))[:NEGATIVES]
        if not others:
            continue
        made.append(
            {
                "anchor": question,
                "positive": answer,
                "negatives": [answer_of[other][1] for other in others],
                "split": split_of[name],
            }
        )
    return made


if __name__ == "__main__":
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows())
    (HERE / "documentation.jsonl").write_text(text + "\n", encoding="utf-8")
