"""Words that code, docs and texts do not use: coined terms, odd idioms, verbs of speech."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("lightning_peft", "gradio_app", "recipes", "docs", "benchmarks", "tools", "tests")
KINDS = {".py", ".pyi", ".md", ".yaml", ".toml", ".json", ".js", ".html", ".css"}
# Records are data, and a lock file or a build output is not ours to word.
LEFT_OUT = (
    "docs/_build", "docs/command-line-reference", "docs/peft-methods", "benchmarks/records",
    "recipes/small/data", "tests/test_language.py",
)  # fmt: skip

# "is no folder", but neither "there is no folder" nor "is no longer".
NO = r"(?<![Tt]here )\b(is|are|was|were) no (?!(longer|more|less|other|such|one|need|way)\b)"
# Each with what to write in its place.
BANNED = {
    r"\btold\b": "reported, named, given",
    r"\banew\b": "again, newly built",
    r"\bbeside\b": "next to, with, in addition to",
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\bin silence\b": "silently",
    r"\bwithout a word\b": "silently, without a warning",
    r"\bways? out\b": "fix, remedy",
    r"\bto the bit\b": "bit for bit",
    r"\bnobody to\b": "no one; better: name the thing",
    r"\bgo(es)? on to\b": "continue",
    rf"{NO}[A-Za-z]": "is not a",
    r"\bReturns what\b": "name what is returned",
    r"\bin (4|8|16|four|eight|sixteen) bits\b": "in 4-bit, quantized to 8-bit",
}
# Identifiers, which may hide in longer names.
BANNED_NAMES = re.compile(
    r"(?<![A-Za-z])(told|twins?|weightless|Promised|Wishe?s?|Standing|Patience|ways?_out|why_not"
    r"|asked_for)(?![A-Za-z])"
)
GERMAN = {
    r"\bBündel": "Batch",
    r"\bAufsummier": "Gradienten akkumulieren",
    r"\bVorlieben\b": "Präferenzen",
    r"\bGegner\b": "verglichene Programme",
    r"\bBelohnungsmodell": "Reward-Modell",
    r"\bSicherungen\b": "Checkpoints",
}


def _files() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "Makefile"]
    for room in ROOMS:
        found += [p for p in (ROOT / room).rglob("*") if p.suffix in KINDS and p.is_file()]
    names = {p: p.relative_to(ROOT).as_posix() for p in found}
    return sorted(p for p, name in names.items() if not name.startswith(LEFT_OUT))


def hits(text: str, words: dict[str, str]) -> list[str]:
    """Returns ``line: match -> replacement`` of each banned word in a text."""
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {match.group()!r} -> {better}"
        for pattern, better in words.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]


def test_no_banned_word():
    wrong = [
        f"{path.relative_to(ROOT)}:{hit}"
        for path in _files()
        for hit in hits(path.read_text(encoding="utf-8"), BANNED)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_banned_name():
    wrong = []
    for path in (p for p in _files() if p.suffix in {".py", ".pyi"}):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            wrong += [f"{path.relative_to(ROOT)}:{number}: {m}" for m in BANNED_NAMES.findall(line)]
    assert not wrong, "\n".join(wrong)


def test_no_banned_german_word():
    for path in sorted((ROOT / "gradio_app" / "texts" / "de").glob("*.json")):
        for key, text in json.loads(path.read_text(encoding="utf-8")).items():
            assert not hits(str(text), GERMAN), f"{path.name}: {key}: {text}"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("It is told in silence.", 2),
        ("X is no LightningModule", 1),
        ("It is no longer used, and there is no network.", 0),
        ("a base in 4 bits", 1),
        ("4-bit", 0),
    ],
)
def test_the_check_can_fail(text, count):
    assert len(hits(text, BANNED)) == count
