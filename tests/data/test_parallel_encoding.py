"""Rows that are encoded by several processes: in their order, and as by one."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.data import parallel_encoding as home
from lightning_peft.data.parallel_encoding import Outcome
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.supervised import SupervisedRows

from .conftest import pairs
from .doubling import Doubled, Refusing


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes few rows many, waits for processes, and notes how many rows each of them was asked."""
    asked: list[int] = []
    submit, start = home._Process.submit, home._Process.__init__

    def noting(self: Any, samples: list[Sample]) -> Any:
        asked.append(len(samples))
        return submit(self, samples)

    def waiting(self: Any, *given: Any) -> None:
        start(self, *given)
        for _ in range(600):
            if self.ready or self.process.poll() is not None:
                return
            time.sleep(0.1)

    monkeypatch.setattr(home, "MIN_ROWS_FOR_WORKERS", 5)
    monkeypatch.setattr(home, "CHUNK", 4)
    # With two, a slow process gets few of so few rows.
    monkeypatch.setattr(home, "MAX_PENDING_CHUNKS", 8)
    monkeypatch.setattr(home, "usable_cores", lambda: 2)
    monkeypatch.setattr(home._Process, "submit", noting)
    monkeypatch.setattr(home._Process, "__init__", waiting)
    return asked


def rows() -> list[Any]:
    """Returns good rows, and bad ones of every kind between them."""
    found: list[Any] = pairs(120)
    found[40] = {"prompt": "What is 40?", "completion": ""}
    found[60] = "{no json"
    found[61] = dict(found[2])
    found[90] = {"prompt": "Long", "completion": "word " * 400}
    found[100] = {**found[100], "note": "x"}
    found[101]["completion"] = [{"role": "assistant", "content": "101", "mood": "glad"}]
    return found


def content(folder: Path) -> dict[str, str]:
    """Returns checksums of all that was prepared."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "summary.json"
    }


def prepared(make: Any, file: str, cache: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns checksums and summary of data that is prepared again."""
    data = make(file, skip_bad_rows=True, max_length=128)
    data.hparams["cache_dir"] = str(cache)
    found = data.read()
    return content(found.folder), found.summary


def test_what_is_prepared_is_the_same(make, write, at_once, tmp_path, monkeypatch) -> None:
    file = write(rows())
    several = prepared(make, file, tmp_path / "several")
    assert sum(at_once) > 50
    asked = len(at_once)
    monkeypatch.setattr(SupervisedRows, "parallelizable", False)
    alone = prepared(make, file, tmp_path / "alone")
    assert len(at_once) == asked
    assert several[0] == alone[0]
    assert len(several[0]) >= 3
    assert several[1] == alone[1]
    assert several[1]["rejected"] == 4
    keys = {key["key"]: key["rows"] for key in several[1]["keys_unused"]}
    assert keys == {"note": {"rows.jsonl": "101"}, "messages[].mood": {"rows.jsonl": "102"}}


def through(encoder: RowEncoder, numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
    return home.encode_rows(encoder, numbers, lambda number: number)


def test_a_process_that_dies_changes_nothing(at_once, monkeypatch) -> None:
    before = home._Process._ask
    count = 0

    def dying(self: Any, question: bytes) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            self.process.kill()
            self.process.wait()
        return before(self, question)

    monkeypatch.setattr(home._Process, "_ask", dying)
    found = list(through(Doubled(), iter(range(100))))
    assert found == [(number, Outcome([{"number": 2 * number}], [])) for number in range(100)]
    assert count == 4


def test_an_encoder_that_cannot_travel_works_here(at_once) -> None:
    encoder: Any = Doubled()
    encoder.held = lambda: None
    assert len(list(through(encoder, iter(range(40))))) == 40
    assert at_once == []


def test_what_fails_there_fails_here_with_its_own_error(at_once) -> None:
    with pytest.raises(ArithmeticError, match="thirty"):
        list(through(Refusing(), iter(range(40))))
    assert at_once != []


def test_stopping_early_leaves_no_process(at_once, monkeypatch) -> None:
    made: list[Any] = []
    start = home._Process.__init__

    def keeping(self: Any, *given: Any) -> None:
        start(self, *given)
        made.append(self.process)

    monkeypatch.setattr(home._Process, "__init__", keeping)
    several = through(Doubled(), iter(range(1000)))
    for _ in range(50):
        next(several)
    assert len(made) == 1
    assert made[0].poll() is None
    several.close()
    assert made[0].poll() is not None


def test_few_rows_start_nothing(at_once) -> None:
    assert len(list(through(Doubled(), iter(range(5))))) == 5
    assert at_once == []


def test_it_ends_with_who_asks_and_imports_nothing_from_where_it_is(tmp_path: Path) -> None:
    hostile = tmp_path
    (hostile / "pickle.py").write_text("raise SystemExit(3)")
    worker = subprocess.Popen(
        [sys.executable, "-c", home._START, "\n".join(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=hostile,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(pickle.dumps(Doubled()))
    worker.stdin.flush()
    assert pickle.load(worker.stdout) is None
    worker.stdin.write(pickle.dumps([3, 4]))
    worker.stdin.flush()
    assert [one.rows for one in pickle.load(worker.stdout)] == [[{"number": 6}], [{"number": 8}]]
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0
    worker.stdout.close()
