"""What the demo shows while it is busy."""

import io
import re
import time

import pytest
from rich.console import Console

from lightning_peft.demo import phases


def shown_by(console, has_bar=False):
    with phases.phase(console, "Answers", has_bar):
        end = time.monotonic() + 30
        while console.file.getvalue().count("\n") < 3 and time.monotonic() < end:
            if console.is_terminal:
                break
            time.sleep(0.005)
    return console.file.getvalue()


@pytest.mark.parametrize("has_bar", [False, True])
def test_a_phase_counts_its_seconds_where_there_is_no_terminal(monkeypatch, has_bar):
    monkeypatch.setattr(phases, "_SECONDS", 0.01)
    lines = shown_by(Console(file=io.StringIO()), has_bar).splitlines()
    assert lines[0] == "Answers ..."
    assert len(lines) >= 3
    assert all(re.fullmatch(r"  \d+ s", line) for line in lines[1:])


def test_a_phase_on_a_terminal_is_one_line_where_something_else_shows_progress():
    plain, spinning = (
        shown_by(Console(file=io.StringIO(), force_terminal=True, width=40), has_bar)
        for has_bar in (True, False)
    )
    assert plain.count("Answers") == 1
    assert spinning.count("Answers") > 1
