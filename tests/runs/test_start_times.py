"""What took how long until the first step."""

import os
import subprocess
import sys

import pytest

from lightning_peft.runs import status
from lightning_peft.runs.status import StartTimes


def test_phases_follow_each_other(monkeypatch):
    times = StartTimes()
    begin = times._last
    for seconds, phase in ((2.5, "imports"), (4.0, "model")):
        monkeypatch.setattr(status.time, "time", lambda seconds=seconds: begin + seconds)
        times.ended(phase)
    assert times.phases == [("imports", pytest.approx(2.5)), ("model", pytest.approx(1.5))]
    assert times.table() == (
        "The first step was done after 4.0 s:\n  imports     2.5 s\n  model       1.5 s"
    )


def test_bitsandbytes_advises_nothing_and_loads_no_compiler():
    code = "import lightning_peft.compat.peft, lightning_peft.compat.bitsandbytes, sys; "
    code += "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0
    assert "kernels" not in done.stderr
    assert done.stdout == "True False\n"
