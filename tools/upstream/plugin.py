"""pytest plugin: patches the tested library where asked for, and records how each test ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

# The modules that got adapters in the test that runs.
INJECTED: list[str] = []
_SEVERITY = ("passed", "skipped", "failed")
# An assertion about files or calls may print thousands of them.
_LONGEST_ERROR = 2000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options that ``tools.upstream`` passes."""
    group = parser.getgroup("upstream")
    group.addoption("--side", default="stock", choices=("stock", "lora", "qlora", "inject"))
    group.addoption("--record", type=Path, required=True)
    group.addoption("--every", type=int, default=1)
    group.addoption("--offset", type=int, default=0)


def pytest_configure(config: pytest.Config) -> None:
    """Patches before any test module is imported."""
    seed_layers()
    side, wanted = config.getoption("--side"), None
    chosen = slice(config.getoption("--offset"), None, config.getoption("--every"))
    if side != "stock":
        # Not above: stock is without this package.
        from tools.upstream.patches import SIDES

        SIDES[side]()
        # What fails stock says nothing.
        stock = read_record(config.getoption("--record").with_name("stock.jsonl"))
        wanted = {test for test, one in stock.items() if one.get("outcome") == "passed"}
        chosen = slice(None)
    config.pluginmanager.register(Recorder(config.getoption("--record"), chosen, wanted))


def seed_layers() -> None:
    """Gives linear layers of one shape the same values in every test, stock and with adapters.

    Tests resume with a fresh module, whose base would be another one than the checkpoint's.
    """
    original = nn.Linear.reset_parameters

    def reset_parameters(self: nn.Linear) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * self.out_features + self.in_features)
            original(self)

    nn.Linear.reset_parameters = reset_parameters  # type: ignore[method-assign]


def read_record(path: Path, start: int = 0) -> dict[str, dict[str, Any]]:
    """Returns the results in a record by test; one that began and did not end has no outcome.

    ``start`` is the byte from which it is read.
    """
    lines = path.read_bytes()[start:].splitlines() if path.is_file() else []
    results = {}
    for line in lines:
        result = json.loads(line)
        results[result["test"]] = result
    return results


def append(path: Path, **result: Any) -> None:
    """Appends one result to a record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


class Recorder:
    """Runs what the record has no outcome of, and adds each outcome as soon as it is known."""

    def __init__(self, path: Path, chosen: slice, wanted: set[str] | None) -> None:
        self.path, self.chosen, self.wanted = path, chosen, wanted
        self.result: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Takes the chosen or the wanted tests, without those that have an outcome."""
        ended = {name for name, one in read_record(self.path).items() if one.get("outcome")}
        items[:] = [
            item
            for item in items[self.chosen]
            if item.nodeid not in ended and (self.wanted is None or item.nodeid in self.wanted)
        ]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Records a file that cannot be imported as one failed test."""
        if report.failed:
            append(self.path, test=report.nodeid, outcome="failed", error=error_of(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Records that a test begins, for one that ends the process."""
        INJECTED.clear()
        self.result = {"test": nodeid, "outcome": "passed", "seconds": 0.0}
        append(self.path, test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the worst of setup, call and teardown."""
        self.result["seconds"] += round(report.duration, 2)
        if _SEVERITY.index(report.outcome) > _SEVERITY.index(self.result["outcome"]):
            self.result |= {"outcome": report.outcome, "error": error_of(report)}

    def pytest_runtest_logfinish(self) -> None:
        """Records the outcome, and whether adapters were injected on the way."""
        append(self.path, **self.result, injected=bool(INJECTED))


def error_of(report: Any) -> str:
    """Returns the failing line and the message of the error, then those of the errors before it."""
    errors = []
    for trace, crash, _ in reversed(getattr(report.longrepr, "chain", [])):
        lines = getattr(trace.reprentries[-1], "lines", [])
        errors.append(" ".join(line[1:].strip() for line in lines if line.startswith(">")))
        errors.append("" if crash is None else crash.message)
    return (" | ".join(filter(None, errors)) or str(report.longrepr))[:_LONGEST_ERROR]
