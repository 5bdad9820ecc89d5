"""The page on troubleshooting knows every refusal of the package, and names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lightning_peft import errors

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
OURS = {name for name, cls in vars(errors).items() if isinstance(cls, type)}


def plain(text: str) -> str:
    """Returns ``text`` without markup and line breaks."""
    return " ".join(text.replace("`", "").replace("\\", "").split())


def pieces(node: ast.AST) -> list[str]:
    """Returns the literal pieces of a message, in order."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return [piece for value in node.values for piece in pieces(value)]
    if isinstance(node, ast.BinOp):
        left, right = pieces(node.left), pieces(node.right)
        both = isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant)
        return ["".join(left + right)] if both else left + right
    return []


def phrases(raised: ast.Call) -> list[str]:
    """Returns the first words of each piece of a message; one of them has to be on the page."""
    literals = [plain(piece).strip(" .,:;()") for piece in pieces(raised.args[0])]
    # Empty where a message is made elsewhere, of what another library said.
    longest = max((len(literal.split()) for literal in literals), default=0)
    return [
        " ".join(literal.split()[:5]).rstrip(" .,:;()")
        for literal in literals
        # Two words may be anywhere; what is quoted has more, where there is more.
        if len(literal.split()) >= min(3, longest)
    ]


def refusals() -> dict[str, list[str]]:
    """Returns the telling words of every error that the package raises on purpose, by place."""
    found = {}
    for path in sorted((ROOT / "lightning_peft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            raised = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(raised, ast.Call) and getattr(raised.func, "id", "") in OURS:
                found[f"{path.relative_to(ROOT)}:{node.lineno}"] = phrases(raised)
    return found


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", text)


def missing_tests(text: str) -> list[str]:
    missing = []
    for file, name in named_tests(text):
        path = ROOT / file
        code = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not re.search(rf"^def {name}\(", code, flags=re.MULTILINE):
            missing.append(f"{file}::{name}")
    return missing


def test_every_refusal_is_on_the_page() -> None:
    found, page = refusals(), plain(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 60
    absent = {k: w for k, w in found.items() if w and not any(one in page for one in w)}
    assert not absent, f"add to {PAGE.name}, with some of these words: {absent}"


def test_every_silent_failure_has_a_test_that_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("## Silent failures")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 25
    assert not [row for row in rows if not named_tests(row)]
    assert not missing_tests(text)


def test_a_test_that_is_gone_is_noticed() -> None:
    here = "tests/test_troubleshooting.py"
    assert missing_tests(f"`{here}::test_that_is_gone`") == [f"{here}::test_that_is_gone"]
    assert missing_tests("`tests/gone.py::test_x`") == ["tests/gone.py::test_x"]
    assert not missing_tests(f"`{here}::test_a_test_that_is_gone_is_noticed`")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ('raise E(f"{x!r}: is one that " "cannot be used here")', ["is one that cannot be"]),
        ('raise E("short:" + itemize(y) + "\\nthe fix")', ["the fix"]),
        ('raise E(f"{x} holds {y}")', ["holds"]),
    ],
)
def test_the_telling_words(code: str, words: list[str]) -> None:
    (node,) = ast.parse(code).body
    assert phrases(node.exc) == words
