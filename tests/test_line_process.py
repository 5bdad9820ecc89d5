"""Child processes: JSON lines both ways, their end, and processes that outlive their parent."""

from __future__ import annotations

import os
import sys
import time

import psutil
import pytest

from lightning_peft.processes import (
    LineProcess,
    ProcessExited,
    process_record,
    recorded_process,
    start_detached,
    usable_cores,
)

ECHO = """import json
from lightning_peft.processes import claim_standard_streams
requests, replies = claim_standard_streams()
print("printed by a library")
for line in requests:
    row = json.loads(line)
    if row.get("end"):
        break
    replies.write(b"not an object\\n" + json.dumps({"echo": row}).encode() + b"\\n")
    replies.flush()
"""


@pytest.fixture
def echo(tmp_path):
    with (tmp_path / "errors").open("wb") as errors:
        process = LineProcess([sys.executable, "-c", ECHO], tmp_path, os.environ, errors)
    yield process
    process.kill()
    assert not process.alive


def test_rows_travel_both_ways_and_what_libraries_print_does_not(echo, tmp_path):
    echo.send({"n": 1})
    assert echo.receive(60) == {"echo": {"n": 1}}
    assert (tmp_path / "errors").read_text() == "printed by a library\n"
    with pytest.raises(TimeoutError):
        echo.receive(0.01)
    assert echo.alive
    assert os.getpgid(echo.pid) == echo.pid


def test_its_end_is_seen_by_every_call(echo):
    echo.send({"end": True})
    for _ in range(2):
        with pytest.raises(ProcessExited):
            echo.receive(60)
    with pytest.raises(ProcessExited):
        echo.send({"n": 1})


def test_a_detached_process_leads_its_own_group_and_is_found_by_its_record(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        argv = [sys.executable, "-c", "print('begun', flush=True); input()"]
        process = start_detached(argv, tmp_path, os.environ, log)
    record = process_record(process.pid)
    # Its input is empty, so it has ended by itself.
    assert process.wait(60) == 1
    assert (tmp_path / "log").read_text().startswith("begun\n")
    assert recorded_process(record) is None
    assert process_record(process.pid) == {"pid": process.pid, "created": 0.0}


def test_another_process_with_the_same_number_is_not_taken_for_it():
    record = process_record(os.getpid())
    assert recorded_process(record).pid == os.getpid()
    assert recorded_process({**record, "created": time.time() + 100}) is None
    assert recorded_process({}) is None


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    # Windows has no such function; psutil knows there as well.
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        before = process.cpu_affinity()
        process.cpu_affinity(before[:1])
        try:
            assert usable_cores() == 1
        finally:
            process.cpu_affinity(before)
        assert usable_cores() == len(before)
        monkeypatch.delattr(psutil.Process, "cpu_affinity")
    # As on macOS.
    assert usable_cores() == os.cpu_count()
