"""What the demo shows while it is busy."""

import io
import re
import time

from rich.console import Console

from lightning_peft.demo import phases


def test_a_phase_counts_its_seconds_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(phases, "_SECONDS", 0.01)
    console = Console(file=io.StringIO())
    with phases.phase(console, "Answers") as end_spinner:
        end_spinner()
        end = time.monotonic() + 30
        while console.file.getvalue().count("\n") < 3 and time.monotonic() < end:
            time.sleep(0.005)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "Answers ..."
    assert len(lines) >= 3
    assert all(re.fullmatch(r"  \d+ s", line) for line in lines[1:])


def test_a_phase_on_a_terminal_spins_until_something_else_shows_progress():
    console = Console(file=io.StringIO(), force_terminal=True, width=40)
    with phases.phase(console, "Answers") as end_spinner:
        end_spinner()
        ended = console.file.getvalue()
        assert ended.count("Answers") > 1
    assert console.file.getvalue() == ended
