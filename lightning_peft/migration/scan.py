"""Scan of a code base by all rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_peft.migration.finding import Finding
from lightning_peft.migration.rules import RULES
from lightning_peft.migration.source import read_code_base
from lightning_peft.migration.trainer import with_strategy


@dataclass(frozen=True)
class Scan:
    """How many files were read, what was found in them, and why others could not be read."""

    files: int
    findings: list[Finding]
    unreadable: list[str]


def scan(path: Path) -> Scan:
    """Reads a code base and applies all rules; nothing of the code runs."""
    base = read_code_base(path)
    findings = with_strategy(base, [one for rule in RULES for one in rule.find(base)])
    findings.sort(key=lambda one: (one.place.path, one.place.cell or 0, one.place.line, one.rule))
    return Scan(len(base.sources), findings, base.unreadable)
