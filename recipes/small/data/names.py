"""Writes ``names.jsonl`` next to this file, from the questions that come with the package.

A row is a question or an answer, in words and without its backticks. What stood between two of
them is a name; of what, the form of the sentence says. Dots and names between them are words of
their own, so that most names are spans of several words.
"""

import hashlib
import json
import re
from pathlib import Path

HERE = Path(__file__).parent
QUESTIONS = HERE.parents[2] / "lightning_peft" / "demo" / "instructions.jsonl"
ROWS_OF_A_FORM = 60
_WORD = re.compile(r"[A-Za-z_]\w*|\d+|[^\w\s]")
# The question, the field that is the sentence, the kind of its first name, and of those after it.
FORMS = (
    (r"What does `([^`]+)` do\?", "prompt", "FUNCTION", ""),
    (r"What is the `([^`]+)` module for\?", "prompt", "MODULE", ""),
    (r"Which module provides the class `([^`]+)`\?", "response", "CLASS", "MODULE"),
    (r"Which module provides the function `([^`]+)`\?", "response", "FUNCTION", "MODULE"),
    (r"What arguments does `([^`]+)` take\?", "response", "FUNCTION", "ARGUMENT"),
)


def order(text: str) -> str:
    """Returns a sort key, so that neighbours in the file have nothing in common."""
    return hashlib.sha256(text.encode()).hexdigest()


def tagged(sentence: str, first: str, others: str) -> dict[str, list[str]]:
    """Returns the words of a sentence and their tags in IOB2."""
    tokens: list[str] = []
    tags: list[str] = []
    for place, piece in enumerate(sentence.split("`")):
        words = _WORD.findall(piece)
        kind = first if place == 1 else others
        named = [f"B-{kind}", *[f"I-{kind}"] * (len(words) - 1)]
        tokens += words
        tags += named if place % 2 else ["O"] * len(words)
    return {"tokens": tokens, "tags": tags}


def rows() -> list[dict[str, list[str]]]:
    """Returns some sentences of each form, no two of which are about one name."""
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    asked = sorted(map(json.loads, lines), key=lambda row: order(row["prompt"]))
    found: list[dict[str, list[str]]] = []
    subjects: set[str] = set()
    for form, field, first, others in FORMS:
        matches = ((row, re.fullmatch(form, row["prompt"])) for row in asked)
        fresh = [(row, m[1]) for row, m in matches if m and m[1] not in subjects]
        chosen = fresh[:ROWS_OF_A_FORM]
        subjects |= {subject for _, subject in chosen}
        found += [tagged(row[field], first, others) for row, _ in chosen]
    return sorted(found, key=lambda row: order(" ".join(row["tokens"])))


def main() -> None:
    """Writes the same file each time."""
    lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in rows()]
    (HERE / "names.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
