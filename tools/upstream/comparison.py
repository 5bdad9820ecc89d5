"""Counts by kind: what passes stock and with adapters, what is expected to differ, and the rest."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

EXPECTED = Path(__file__).with_name("expected.yaml")
Results = dict[str, dict[str, Any]]


@dataclass
class Comparison:
    """Two records of the same tests.

    Attributes:
        counts: Number of tests by kind.
        expected: Number of tests by the reason for which they fail with adapters.
        unexpected: The other tests that pass stock and fail or are skipped with adapters, with
            their errors.
        missing: The tests that pass stock and have no outcome with adapters.
    """

    counts: Counter[str] = field(default_factory=Counter)
    expected: Counter[str] = field(default_factory=Counter)
    unexpected: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def read_expected(suite: str) -> list[dict[str, str]]:
    """Returns the expected differences of a suite: each a reason and what it is recognised by.

    ``error`` and ``tests``, which may be absent, are patterns; both have to be found in the error
    and in the name of the test. The first entry that fits counts.
    """
    entries: list[dict[str, str]] = yaml.safe_load(EXPECTED.read_text(encoding="utf-8"))[suite]
    return entries


def compare(stock: Results, ours: Results, expected: list[dict[str, str]]) -> Comparison:
    """Compares what passes stock with what became of it with adapters."""
    found = Comparison()
    # Files, and folders, that cannot be imported with adapters.
    broken = {
        (f"{name}::", f"{name}/"): one
        for name, one in ours.items()
        if one.get("outcome") == "failed" and name not in stock
    }
    for test, before in stock.items():
        after = ours.get(test, {})
        if "outcome" not in after:
            after = next((one for begin, one in broken.items() if test.startswith(begin)), after)
        if before.get("outcome") != "passed":
            found.counts[f"{before.get('outcome')} stock"] += 1
        elif "outcome" not in after:
            found.missing.append(test)
        elif after["outcome"] == "passed":
            found.counts["pass both, " + ("with" if after["injected"] else "no") + " adapters"] += 1
        elif (reason := reason_for(test, after["error"], expected)) is not None:
            found.expected[reason] += 1
        else:
            found.unexpected[test] = after["error"]
    return found


def reason_for(test: str, error: str, expected: list[dict[str, str]]) -> str | None:
    """Returns why ``test`` may fail with ``error``, or ``None``."""
    for entry in expected:
        named = re.search(entry.get("tests", ""), test)
        if named and re.search(entry["error"], error, re.DOTALL):
            return entry["reason"]
    return None


def table(found: Comparison) -> str:
    """Returns the counts as tables in Markdown."""
    rows = {
        "pass both, adapters in the test": found.counts["pass both, with adapters"],
        "pass both, no adapters in the test": found.counts["pass both, no adapters"],
        "pass stock, fail with adapters as expected": found.expected.total(),
        "pass stock, fail or are skipped with adapters otherwise": len(found.unexpected),
        "not run with adapters yet": len(found.missing),
        "fail stock, and are not run with adapters": found.counts["failed stock"],
        "skipped stock": found.counts["skipped stock"],
    }
    lines = ["| Tests | |", "| --- | --- |", *(f"| {kind} | {n} |" for kind, n in rows.items())]
    lines += ["", "| Expected difference | Tests |", "| --- | --- |"]
    lines += [f"| {reason} | {count} |" for reason, count in found.expected.most_common()]
    return "\n".join(lines)
