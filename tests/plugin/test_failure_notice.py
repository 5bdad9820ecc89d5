"""Processes know of each other's errors, and of those that will never come."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from uneven_processes import CASES

from lightning_peft.errors import LifecycleError
from lightning_peft.plugin import failure_notice
from lightning_peft.plugin.failure_notice import FailureNotice

CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"


@pytest.fixture
def notices(monkeypatch):
    """Those of two processes, which here are threads with one store."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(failure_notice, "group_store", lambda prefix: store)
    both = [FailureNotice(), FailureNotice()]
    for rank, one in enumerate(both):
        one.start(rank, 2)
    yield both
    for one in both:
        one.stop()


def in_both(notices, *names):
    """Lets each meet under a name; returns the errors."""

    def meet(notice, name):
        try:
            notice.monitored_barrier(name)
        except LifecycleError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(meet, notices, names))


def test_processes_that_come_wait_for_each_other(notices):
    for _ in range(3):
        for one in notices:
            one.begin_batch()
        assert in_both(notices, "save", "save") == ["", ""]
        assert in_both(notices, "save", "save") == ["", ""]


def test_a_process_that_has_gone_on_ends_the_one_that_waits(notices):
    first, second = notices
    for _ in range(2):
        first.begin_batch()
    for _ in range(3):
        second.begin_batch()
    with pytest.raises(
        LifecycleError, match="Process 0 waits for all .* 'end' at batch 2"
    ) as raised:
        first.monitored_barrier("end")
    assert "process 1 has begun batch 3 of the fit" in str(raised.value)
    error = RuntimeError(CLOSED)
    second.send(error)
    assert str(error).startswith("Process 0 waits for all processes")
    assert str(error).endswith(CLOSED)


def test_processes_that_wait_in_different_places_end(notices):
    found = in_both(notices, "save", "end")
    assert all("They would wait for ever" in one and "waits in" in one for one in found)


def test_an_error_in_one_ends_the_other(notices):
    first, second = notices
    second.send(ValueError("a row is wrong"))
    with pytest.raises(LifecycleError, match="Process 1 has ended by ValueError: a row is wrong"):
        first.monitored_barrier("save")
    own = ValueError("mine")
    first.send(own)
    assert str(own) == "mine"


@pytest.mark.long
def test_mistakes_of_others_end_all_processes_with_the_reason(program, tmp_path):
    program.run_script(tmp_path, Path(__file__).with_name("uneven_processes.py"), str(tmp_path))
    for name, (victim, _, expected) in CASES.items():
        answers = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1)]
        wrong = [one for rank, one in enumerate(answers) if rank != victim and expected not in one]
        assert not wrong, (name, answers)
    assert torch.load(tmp_path / "exchanges0.pt") == "exit 1"
