"""The tool that runs other projects' tests with adapters, on tests that are written here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools.upstream.comparison import EXPECTED, compare, read_expected, table

ROOT = Path(__file__).parents[1]
SUITE = """
import os

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel


def fit(tmp_path, **given):
    module = BoringModel()
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, limit_train_batches=2, limit_val_batches=1,
        max_epochs=1, logger=False, enable_progress_bar=False, **given,
    )
    trainer.fit(module)
    return module


def test_trains(tmp_path):
    fit(tmp_path)


def test_layer_has_its_two_parameters(tmp_path):
    assert len(list(fit(tmp_path, enable_checkpointing=False).layer.parameters())) == 2


def test_trains_nothing():
    assert torch.ones(2).sum() == 2


def test_fails_stock(tmp_path):
    raise ValueError("always")


@pytest.mark.skip(reason="as an example")
def test_skipped():
    pass


def test_ends_the_process(tmp_path):
    fit(tmp_path)
    if any("lora" in name for name in fit(tmp_path).state_dict()):
        os._exit(7)


def test_comes_after_it():
    pass
"""


def result(outcome: str, error: str = "", injected: bool = True) -> dict[str, object]:
    return {"outcome": outcome, "error": error, "injected": injected}


def test_counts_by_kind_and_reason():
    stock = {name: result("passed") for name in "abcdgh"}
    stock |= {"e": result("failed"), "f": result("skipped")}
    ours = {
        "a": result("passed"),
        "b": result("passed", injected=False),
        "c": result("failed", "no attribute 'x'"),
        "d": result("failed", "another"),
        "g": result("skipped"),
    }
    expected = [
        {"reason": "of another test", "error": "no attribute", "tests": "other"},
        {"reason": "there is no x", "error": "no attribute '[xy]'"},
    ]
    found = compare(stock, ours, expected)
    assert found.expected == {"there is no x": 1}
    assert found.unexpected == {"d": "another"}
    assert found.counts == {
        "pass both, with adapters": 1,
        "pass both, no adapters": 1,
        "failed stock": 1,
        "skipped stock": 1,
        "not run with adapters": 2,
    }
    assert "| there is no x | 1 |" in table(found).splitlines()


def test_every_expected_difference_is_on_the_page():
    page = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    for suite in yaml.safe_load(EXPECTED.read_text(encoding="utf-8")):
        for entry in read_expected(suite):
            assert {"reason", "error", "tests"} >= entry.keys() > {"reason"}
            assert f"| {entry['reason']} |" in page


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_run_compares_survives_a_crash_and_continues(tmp_path):
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "test_some.py").write_text(SUITE, encoding="utf-8")
    command = [sys.executable, "-m", "tools.upstream", "lightning", str(tmp_path)]
    command += ["--tests", "suite", "--results", str(tmp_path / "results")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    cells = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if " | " in line]
    rows = {row[0]: row[1] for row in cells if len(row) == 2}
    assert rows["pass both, adapters in the test"] == "1"
    assert rows["pass both, no adapters in the test"] == "2"
    # The adapted layer is named in the error, and has a class of its own.
    assert rows["pass stock, fail with adapters as expected"] == "1"
    assert rows["pass stock, fail with adapters otherwise"] == "1"
    assert rows["fail stock, and are not run with adapters"] == "1"
    assert rows["skipped stock"] == "1"
    assert "the process ended in this test (7)" in run.stdout
    # All are in the record: nothing runs again, and the counts are the same.
    record = (tmp_path / "results" / "lora.jsonl").read_text(encoding="utf-8")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (1, run.stdout)
    assert (tmp_path / "results" / "lora.jsonl").read_text(encoding="utf-8") == record
