"""The tool that runs other projects' tests with adapters, on tests that are written here."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tools.upstream import __main__ as upstream
from tools.upstream.comparison import EXPECTED, compare, read_expected, reason_for, table
from tools.upstream.plugin import read_record

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


BROKEN = """
import sys

if "tools.upstream.patches" in sys.modules:
    raise ImportError("not of a patched library")


def test_in_a_file_that_is_not_imported_with_adapters():
    pass
"""
PEFT_SUITE = """
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

X = torch.randn(3, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 2)

    def forward(self, x):
        return self.outer(self.inner(x).relu())


def adapted():
    return get_peft_model(Net(), LoraConfig(target_modules=["inner"], init_lora_weights=False))


def test_a_saved_adapter_is_loaded(tmp_path):
    model = adapted().eval()
    assert not torch.allclose(model(X), Net()(X))
    model.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(Net(), tmp_path)(X), model(X))


def test_a_merge_keeps_the_output():
    model = adapted().eval()
    before = model(X)
    with model.disable_adapter():
        assert torch.allclose(model(X), Net()(X))
    merged = model.merge_and_unload()
    assert type(merged) is Net
    assert torch.allclose(merged(X), before, atol=1e-6)


def test_attributes_parametrized():
    model = adapted()
    assert hasattr(model, "push_to_hub")


def test_there_is_a_model_card(tmp_path):
    adapted().save_pretrained(tmp_path)
    assert os.path.exists(tmp_path / "README.md")


def test_of_the_class():
    if not isinstance(adapted(), PeftModel):
        pytest.skip("of another class")
"""
# Begins what stands for pytest: notes a test in the record, which is its first argument.
NOTE = """
import fcntl, json, os, sys, time
def note(test, outcome=None, error="", injected=True):
    with open(sys.argv[1], "a") as file:
        one = {"test": test, "error": error, "injected": injected}
        file.write(json.dumps(one | ({"outcome": outcome} if outcome else {})) + "\\n")
"""
Processes = Callable[..., None]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    """Sets the Python code that is run, by side, in place of pytest."""

    def use(**code: str) -> None:
        def command(given: Namespace, side: str, record: Path) -> list[str]:
            return [sys.executable, "-ISc", NOTE + code[side], str(record)]

        monkeypatch.setattr(upstream, "pytest_command", command)

    return use


def result(outcome: str, error: str = "", injected: bool = True) -> dict[str, object]:
    return {"outcome": outcome, "error": error, "injected": injected}


def test_counts_by_kind_and_reason():
    stock = {name: result("passed") for name in ("a", "b", "c", "d", "g", "h", "t.py::X::i")}
    stock |= {"e": result("failed"), "f": result("skipped"), "u.py::j": result("passed")}
    ours = {
        "a": result("passed"),
        "b": result("passed", injected=False),
        "c": result("failed", "no attribute 'x'"),
        "d": result("failed", "another"),
        "g": result("skipped", "needs x"),
        "h": {"test": "h"},
        # Files that could not be imported, the second one until lately.
        "t.py": result("failed", "ImportError"),
        "u.py": result("failed", "ImportError"),
        "u.py::j": result("passed"),
    }
    expected = [
        {"reason": "of another test", "error": "no attribute", "tests": "other"},
        {"reason": "there is no x", "error": "no attribute '[xy]'"},
    ]
    found = compare(stock, ours, expected)
    assert found.expected == {"there is no x": 1}
    assert found.unexpected == {"d": "another", "g": "needs x", "t.py::X::i": "ImportError"}
    assert found.missing == ["h"]
    assert found.counts == {
        "pass both, with adapters": 2,
        "pass both, no adapters": 1,
        "failed stock": 1,
        "skipped stock": 1,
    }
    lines = table(found).splitlines()
    assert {"| there is no x | 1 |", "| not run with adapters yet | 1 |"} <= set(lines)


def test_every_expected_difference_is_on_the_page_and_has_an_error_of_its_own():
    page = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    for suite in yaml.safe_load(EXPECTED.read_text(encoding="utf-8")):
        for entry in read_expected(suite):
            assert {"reason", "error", "tests"} >= entry.keys() >= {"reason", "error"}
            assert f"| {entry['reason']} |" in page
            alone = [{"reason": "", "error": entry["error"]}]
            for error in ("", "ValueError: another", "assert before == after | AssertionError"):
                assert reason_for("", error, alone) is None


FAULTS = {
    "lightning": [
        ("test_a", "found = state['adapters'] | KeyError: 'adapters'"),
        ("test_a", "fit(x) | RecursionError: maximum recursion depth exceeded"),
        ("test_a", "AttributeError: 'NoneType' object has no attribute 'dataloader'"),
        (
            "test_a",
            "assert torch.allclose(before, after) | AssertionError: assert False\n"
            " +  where False = allclose(..., Sequential(LoraLinear(32, 2)))",
        ),
        (
            "test_a",
            "lightning_peft.errors.UnsupportedError: Adapters cannot be trained together with:\n"
            " - callback EMAWeightAveraging: it replaces weights",
        ),
    ],
    "peft": [
        ("test_a", "lightning_peft.errors.UnsupportedError: no layers. Load, then merge"),
        (
            "test_attributes_parametrized[a]",
            "get_peft_model() | KeyError: 'a'",
        ),
        ("test_adapter_dtype_autocast[a]", "model.save_pretrained(tmp_path) | KeyError: 'a'"),
        ("test_from_pretrained_config_construction[a]", "model.save_pretrained(a) | OSError"),
        ("test_disable_adapters_exiting_context_irregular_state[a]", "get_peft_model() | OSError"),
        (
            "test_save_load_roundtrip_fsdp_wrapped[a]",
            "assert torch.allclose(output_after, output_before) | AssertionError",
        ),
    ],
}


@pytest.mark.parametrize(
    ("suite", "test", "error"), [(suite, *one) for suite in FAULTS for one in FAULTS[suite]]
)
def test_a_fault_is_not_taken_for_an_expected_difference(suite, test, error):
    assert reason_for(test, error, read_expected(suite)) is None


def test_the_exit_code_says_what_was_lost_and_again_runs_it(processes, tmp_path, capsys):
    command = ["lightning", str(tmp_path), "--results", str(tmp_path / "results")]
    stock = 'note("t.py::a", "passed"); note("t.py::b", "passed"); note("t.py::c", "failed", "no")'
    processes(stock=stock, lora='note("t.py", "failed", "ImportError: x"); sys.exit(1)')
    assert upstream.main(command) == 1
    out = capsys.readouterr().out
    assert "t.py::a\n    ImportError: x\n\nt.py::b\n    ImportError: x" in out
    assert f"lightning-peft {upstream.state_of(ROOT, *upstream.PACKAGE)}" in out
    # What failed runs again, stock too; a test that is gone is named.
    processes(stock='note("t.py::c", "passed")', lora='note("t.py::a", "passed")')
    assert upstream.main([*command, "--again"]) == 3
    assert capsys.readouterr().out.endswith("with adapters:\nt.py::b\nt.py::c\n")
    processes(stock="", lora='note("t.py::b", "passed"); note("t.py::c", "passed")')
    assert upstream.main(command) == 0


def test_when_time_is_up_nothing_runs_on_and_the_next_run_blames_no_test(processes, tmp_path):
    record, lock = tmp_path / "lora.jsonl", tmp_path / "lock"
    given = Namespace(checkout=tmp_path)
    processes(
        lora=f"""
file = open({str(lock)!r}, "w")
fcntl.flock(file, fcntl.LOCK_EX)
note("t.py::a")
os.fork()
time.sleep(30)
"""
    )
    assert not upstream.run(given, "lora", record, 1.0)
    assert read_record(record).keys() == {"t.py::a"}
    with lock.open() as file:
        # A process that is killed holds it for some milliseconds.
        until = time.monotonic() + 5
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < until, "a process of the test still runs"
                time.sleep(0.01)
    processes(lora='note("t.py::b", "passed")')
    assert upstream.run(given, "lora", record, 30)
    outcomes = {name: one.get("outcome") for name, one in read_record(record).items()}
    assert outcomes == {"t.py::a": None, "t.py::b": "passed"}


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_each_commit_and_change_has_records_of_its_own(tmp_path):
    assert upstream.state_of(tmp_path) == "no-commit"
    git(tmp_path, "init")
    file, new = tmp_path / "a.py", tmp_path / "new.py"
    file.write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "one")
    states = [upstream.state_of(tmp_path, "*.py")]
    for changed, text in ((file, "2"), (new, "1"), (new, "2")):
        changed.write_text(text)
        states.append(upstream.state_of(tmp_path, "*.py"))
    git(tmp_path, "commit", "-a", "-m", "two")
    states += [upstream.state_of(tmp_path, "*.py"), upstream.state_of(tmp_path)]
    assert len(set(states)) == len(states)
    assert states[-1].isalnum()
    (tmp_path / "notes.txt").write_text("of no concern")
    assert upstream.state_of(tmp_path, "*.py") == states[-2]


def test_each_ref_is_cloned_and_a_missing_checkout_is_named(tmp_path, capsys):
    origin = tmp_path / "origin"
    origin.mkdir()
    git(origin, "init")
    found = []
    for ref in ("v1", "v2"):
        git(origin, "commit", "--allow-empty", "-m", ref)
        git(origin, "tag", ref)
        command = ["peft", origin.as_uri(), "--ref", ref, "--results", str(tmp_path / "results")]
        found.append(upstream.state_of(upstream.parse(command).checkout))
    assert len(set(found)) == 2
    for words, error in (([], "there is no folder"), (["--ref", "v1"], "--ref is for a URL")):
        with pytest.raises(SystemExit):
            upstream.parse(["peft", str(tmp_path / "nowhere"), *words])
        assert error in capsys.readouterr().err


def rows_of(run: subprocess.CompletedProcess[str]) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if " | " in line]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def command_of(suite: str, folder: Path, **files: str) -> list[str]:
    (folder / "suite").mkdir()
    for name, content in files.items():
        (folder / "suite" / f"{name}.py").write_text(content, encoding="utf-8")
    command = [sys.executable, "-m", "tools.upstream", suite, str(folder), "--tests", "suite"]
    return [*command, "--results", str(folder / "results")]


@pytest.mark.long
def test_a_run_compares_survives_a_crash_and_continues(tmp_path):
    command = command_of("lightning", tmp_path, test_some=SUITE, test_broken=BROKEN)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    rows = rows_of(run)
    assert rows["pass both, adapters in the test"] == "1"
    assert rows["pass both, no adapters in the test"] == "2"
    # The adapted layer is named in the error, and has a class of its own.
    assert rows["pass stock, fail with adapters as expected"] == "1"
    assert rows["pass stock, fail or are skipped with adapters otherwise"] == "2"
    assert rows["fail stock, and are not run with adapters"] == "1"
    assert rows["skipped stock"] == "1"
    assert "the process ended in this test (7)" in run.stdout
    assert "test_in_a_file_that_is_not_imported_with_adapters\n" in run.stdout
    assert "ImportError: not of a patched library" in run.stdout
    # All are in the record: nothing runs again, and the counts are the same.
    (record,) = (tmp_path / "results").glob("*/lora-*.jsonl")
    ended = [one for one in read_record(record).items() if "seconds" in one[1]]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (1, run.stdout)
    assert [one for one in read_record(record).items() if "seconds" in one[1]] == ended


@pytest.mark.long
def test_the_functions_of_peft_are_served_by_this_package(tmp_path):
    command = command_of("peft", tmp_path, test_some=PEFT_SUITE)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stderr
    rows = rows_of(run)
    assert rows["pass both, adapters in the test"] == "2", run.stdout
    assert rows["a module with adapters is not a `PeftModel`, so it has no `push_to_hub`"] == "1"
    assert rows["pass stock, fail or are skipped with adapters otherwise"] == "2"
    assert "of another class" in run.stdout
    assert "README.md" in run.stdout
