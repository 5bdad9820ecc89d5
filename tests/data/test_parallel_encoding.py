"""Rows that are encoded by several processes: in their order, and as by one."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lightning_peft.compat.torch import signal_handling
from lightning_peft.data import parallel_encoding as home
from lightning_peft.data import preparation
from lightning_peft.data.parallel_encoding import Outcome
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.supervised import SupervisedRows
from lightning_peft.data.text_classification import TextClassificationData
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError, HubError

from .conftest import pairs

# As a user writes it: nothing keeps a process that is spawned from running it once more.
SCRIPT = """import sys
from lightning_peft import SupervisedData
from lightning_peft.data import parallel_encoding as home
from lightning_peft.data import preparation
file, tokenizer, cache, home.START_METHOD = sys.argv[1:]
home.MIN_ROWS_FOR_WORKERS = dict.fromkeys(home.MIN_ROWS_FOR_WORKERS, 5)
preparation.usable_cores = lambda: 2
print("the user's script", flush=True)
data = SupervisedData(file, tokenizer, chat_template="plain", cache_dir=cache)
print(data.read().summary["rows"], flush=True)
"""


class Doubled(RowEncoder):
    """Takes numbers for samples."""

    parallelizable = True

    def encode(self, sample: Any) -> list[dict[str, Any]]:
        return [{"number": 2 * sample}]


@pytest.fixture
def workers() -> Callable[[], list[Any]]:
    """Returns the processes that the test has started and that have not ended."""
    before = {process.pid for process in multiprocessing.active_children()}
    return lambda: [one for one in multiprocessing.active_children() if one.pid not in before]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes few rows many, and notes the samples that this process encodes itself."""
    encoded: list[Any] = []
    outcome = home.outcome

    def noting(encoder: Any, sample: Any) -> Outcome:
        encoded.append(sample)
        return outcome(encoder, sample)

    few = dict.fromkeys(home.MIN_ROWS_FOR_WORKERS, 5)
    monkeypatch.setattr(home, "MIN_ROWS_FOR_WORKERS", few)
    monkeypatch.setattr(home, "CHUNK", 4)
    monkeypatch.setattr(home, "outcome", noting)
    monkeypatch.setattr(preparation, "usable_cores", lambda: 2)
    return encoded


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
    found = make(file, skip_bad_rows=True, max_length=128, cache_dir=str(cache)).read()
    return content(found.folder), found.summary


def alone(make: Any, file: str, cache: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the same of data that one process prepares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "usable_cores", lambda: 1)
        return prepared(make, file, cache)


def through(encoder: Any, count: int, processes: int = 2) -> Any:
    return home.encode_rows(encoder, iter(range(count)), lambda number: number, processes)


def test_what_is_prepared_is_the_same(make, write, here, workers, tmp_path) -> None:
    file = write(rows())
    random = torch.get_rng_state()
    several = prepared(make, file, tmp_path / "several")
    assert len(here) == 5
    assert workers() == []
    assert torch.equal(torch.get_rng_state(), random)
    one = alone(make, file, tmp_path / "alone")
    assert len(here) == 5 + 120
    assert several == one
    assert len(several[0]) >= 3
    assert several[1]["rejected"] == 4
    keys = {key["key"]: key["rows"] for key in several[1]["keys_unused"]}
    assert keys == {"note": {"rows.jsonl": "101"}, "messages[].mood": {"rows.jsonl": "102"}}


def test_labels_are_found_the_same(build, write, here, tmp_path) -> None:
    file = write([{"text": f"Text {i}", "label": "abc"[i % 3]} for i in range(60)])
    made = partial(build, TextClassificationData, tokenizer=str(BASE))
    several = prepared(made, file, tmp_path / "several")
    assert len(here) == 5
    assert several == alone(made, file, tmp_path / "alone")
    assert several[1]["labels"] == ["a", "b", "c"]
    assert several[1]["splits"]["train"]["tokens"] > 0


def test_a_process_that_dies_changes_nothing(
    make, write, here, tmp_path, monkeypatch, caplog
) -> None:
    file, encode, own = write(rows()), SupervisedRows.encode, os.getpid()

    def dying(self: Any, sample: Any) -> Any:
        if os.getpid() != own and "50" in str(sample.messages):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, sample)

    monkeypatch.setattr(SupervisedRows, "encode", dying)
    # As after a Trainer that put back the handlers that it had found.
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", True)
    monkeypatch.setattr(home, "TIMEOUT_SECONDS", 3600)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    several = prepared(make, file, tmp_path / "several")
    assert len(here) == 5 + 120
    signal.signal(signal.SIGCHLD, before)
    assert "The rows are prepared again, in one process" in caplog.text
    assert several == alone(make, file, tmp_path / "alone")
    assert [path.name for path in (tmp_path / "several").iterdir() if path.name[0] == "."] == []


@pytest.mark.parametrize("kind", [ArithmeticError, ConfigError])
def test_what_fails_there_fails_here_with_its_own_error(
    kind, make, write, here, tmp_path, monkeypatch
) -> None:
    encode = SupervisedRows.encode

    def refusing(self: Any, sample: Any) -> Any:
        if "What is 30?" in str(sample.messages):
            raise kind("thirty")
        return encode(self, sample)

    monkeypatch.setattr(SupervisedRows, "encode", refusing)
    with pytest.raises(kind, match="^thirty$"):
        prepared(make, write(pairs(60)), tmp_path / "cache")
    assert len(here) == 5 + 31
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("kind", [HubError, RuntimeError])
def test_what_fails_here_is_not_tried_again(
    kind, make, write, here, tmp_path, monkeypatch, caplog
) -> None:
    def refusing(self: Any, sample: Any) -> Any:
        raise kind("no worker has to do with it")

    monkeypatch.setattr(SupervisedRows, "encode", refusing)
    with pytest.raises(kind, match="no worker"):
        prepared(make, write(pairs(60)), tmp_path / "cache")
    assert len(here) == 1
    assert "again" not in caplog.text


@pytest.mark.long
def test_a_process_that_hangs_is_not_waited_for(here, workers, monkeypatch) -> None:
    own = os.getpid()

    class Hanging(Doubled):
        def encode(self, sample: Any) -> list[dict[str, Any]]:
            if os.getpid() != own:
                time.sleep(3600)
            return super().encode(sample)

    monkeypatch.setattr(home, "TIMEOUT_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(home.WorkersFailed, match="timed out after 0.5 seconds"):
        list(through(Hanging(), 20))
    assert time.monotonic() - started < 60
    assert workers() == []


def test_an_encoder_that_cannot_travel_is_refused_where_it_must(here, monkeypatch) -> None:
    encoder: Any = Doubled()
    encoder.held = lambda: None
    assert len(list(through(encoder, 40))) == 40
    assert len(here) == 5
    monkeypatch.setattr(home, "START_METHOD", "spawn")
    with pytest.raises(home.WorkersFailed, match="pickle"):
        list(through(encoder, 40))


@pytest.mark.parametrize("processes", [1, 2])
def test_stopping_early_leaves_no_process(here, workers, processes) -> None:
    several = through(Doubled(), 1000, processes)
    with closing(several):
        for _ in range(50):
            next(several)
        assert len(workers()) == (2 if processes == 2 else 0)
    assert workers() == []


def test_an_interrupt_leaves_nothing(make, write, here, workers, tmp_path, monkeypatch) -> None:
    write_row, started = preparation._PreparationPass._write, []

    def interrupted(self: Any, parsed_row: Any, *given: Any) -> None:
        write_row(self, parsed_row, *given)
        if parsed_row.row.number == 50:
            started.extend(workers())
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(preparation._PreparationPass, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared(make, write(rows()), tmp_path / "cache")
    assert len(started) == 2
    assert workers() == []
    assert list((tmp_path / "cache").iterdir()) == []


def test_few_rows_start_nothing(here, monkeypatch) -> None:
    monkeypatch.setattr(home, "DataLoader", None)
    assert len(list(through(Doubled(), 5))) == 5
    assert len(here) == 5


def test_what_is_set_for_processes_to_start_is_taken_back(monkeypatch) -> None:
    monkeypatch.setattr(home, "START_METHOD", "spawn")
    main, environment = sys.modules["__main__"], os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    before = dict(environment)
    with home._conditions_of_start():
        assert not hasattr(sys.modules["__main__"], "__file__")
        assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert sys.modules["__main__"] is main
    assert dict(environment) == before


@pytest.mark.long
def test_processes_that_are_spawned_do_the_same(here, monkeypatch, tmp_path) -> None:
    (tmp_path / "pickle.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(home, "START_METHOD", "spawn")
    found = list(through(Doubled(), 40))
    assert found == [(number, Outcome([{"number": 2 * number}], [])) for number in range(40)]
    assert len(here) == 5


def encode_without_end() -> None:
    for _ in through(Doubled(), 1000):
        time.sleep(0.1)


def test_processes_end_with_a_killed_parent(here) -> None:
    parent = multiprocessing.get_context("fork").Process(target=encode_without_end)
    parent.start()
    started: list[psutil.Process] = []
    for _ in range(300):
        started = psutil.Process(parent.pid).children()
        if len(started) == 2:
            break
        time.sleep(0.1)
    assert len(started) == 2
    time.sleep(0.5)
    parent.kill()
    parent.join()
    assert psutil.wait_procs(started, timeout=20)[1] == []


def start_script(write: Any, folder: Path, count: int, method: str) -> Any:
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "script.py", write(pairs(count)), str(BASE), str(folder / "c"), method],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.long
def test_a_script_needs_no_guard_for_its_processes(write, tmp_path) -> None:
    out, err = start_script(write, tmp_path, 50, "spawn").communicate()
    assert out.splitlines() == ["the user's script", "50"]
    assert "prepared again" not in err


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(write, tmp_path, number) -> None:
    script = start_script(write, tmp_path, 40_000, "fork")
    started: list[psutil.Process] = []
    for _ in range(600):
        started = psutil.Process(script.pid).children()
        if len(started) == 2:
            break
        time.sleep(0.1)
    assert len(started) == 2
    time.sleep(1)
    # Ctrl-C in a terminal reaches all of them.
    (os.killpg if number == signal.SIGINT else os.kill)(script.pid, number)
    _, err = script.communicate()
    assert script.returncode != 0
    assert err.count("Traceback") == (1 if number == signal.SIGINT else 0)
    assert psutil.wait_procs(started, timeout=30)[1] == []
    if number == signal.SIGINT:
        # But for finished parts, which the next preparation takes.
        left = [path.name for path in (tmp_path / "c").iterdir()]
        assert [name for name in left if not name.endswith("-parts")] == []
