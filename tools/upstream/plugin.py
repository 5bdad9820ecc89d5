"""pytest plugin: patches the tested library where asked for, and records how each test ended."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tools.upstream import patches

_SEVERITY = ("passed", "skipped", "failed")
# An assertion about files or calls may print thousands of them.
_LONGEST_ERROR = 2000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options that ``tools.upstream`` passes."""
    group = parser.getgroup("upstream")
    group.addoption("--side", default="stock", choices=("stock", *patches.SIDES))
    group.addoption("--record", type=Path, required=True)
    group.addoption("--every", type=int, default=1)


def pytest_configure(config: pytest.Config) -> None:
    """Patches before any test module is imported."""
    patches.seed_layers()
    side = config.getoption("--side")
    if side != "stock":
        patches.SIDES[side]()
    recorder = Recorder(config.getoption("--record"), config.getoption("--every"))
    config.pluginmanager.register(recorder)


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the results in a record by test; one that began and did not end has no outcome."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
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

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.result: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Takes every n-th test of the file, without those that have an outcome."""
        ended = {name for name, one in read_record(self.path).items() if one.get("outcome")}
        items[:] = [item for item in items[:: self.every] if item.nodeid not in ended]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Records a file that cannot be imported as one failed test."""
        if report.failed:
            append(self.path, test=report.nodeid, outcome="failed", error=error_of(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Records that a test begins, for one that ends the process."""
        patches.INJECTED.clear()
        self.result = {"test": nodeid, "outcome": "passed", "seconds": 0.0}
        append(self.path, test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the worst of setup, call and teardown."""
        self.result["seconds"] += round(report.duration, 2)
        if _SEVERITY.index(report.outcome) > _SEVERITY.index(self.result["outcome"]):
            self.result |= {"outcome": report.outcome, "error": error_of(report)}

    def pytest_runtest_logfinish(self) -> None:
        """Records the outcome, and whether adapters were injected on the way."""
        append(self.path, **self.result, injected=bool(patches.INJECTED))


def error_of(report: Any) -> str:
    """Returns the message of the error and of those that led to it."""
    chain: Iterable[Any] = getattr(report.longrepr, "chain", ())
    messages = [crash.message for _, crash, _ in chain if crash is not None]
    return " | ".join(reversed(messages or [str(report.longrepr)]))[:_LONGEST_ERROR]
