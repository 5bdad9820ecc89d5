"""The load of the machine, written while a run trains."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch

from lightning_peft.runs import load
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.load import LoadLog


def test_load_is_written_over_all_sessions_until_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "SHORTEST", 0.02)
    folder = RunFolder.at(tmp_path)
    log = LoadLog(folder, earlier=60.0, more=lambda: {"tokens_per_second": 7.0})
    end = time.monotonic() + 20
    while len(list(folder.rows(folder.load))) < 3 and time.monotonic() < end:
        sum(range(20_000))
    log.close()
    rows = list(folder.rows(folder.load))
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert 60 <= seconds[0] < 90
    assert max(row["cpu_percent"] for row in rows) > 0
    used = psutil.Process().memory_info().rss
    assert all(0.5 * used < row["process_bytes"] < 2 * used for row in rows)
    assert all(row["tokens_per_second"] == 7.0 for row in rows)
    time.sleep(0.1)
    assert list(folder.rows(folder.load)) == rows


def test_a_driver_that_refuses_takes_no_other_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LoadLog(RunFolder.at(tmp_path), earlier=0.0, more=dict)
    log.device = torch.device("cuda", 0)
    # Without a GPU, torch refuses to tell how busy it is.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert {"cpu_percent", "process_bytes", "cuda_bytes"} <= log.line().keys()
    log.close()
