"""The processes of tests."""

from __future__ import annotations

import time

import psutil
import pytest

LEAVES = """
import os, sys, time
if not (child := os.fork()):
    os.close(1), os.close(2)
    time.sleep(600)
print(child)
sys.exit(3)
"""


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.timeout(60)
def test_what_a_process_leaves_is_ended(program, tmp_path):
    code, out, _ = program.run(tmp_path, code=LEAVES)
    assert code == 3
    while runs(int(out)):
        time.sleep(0.01)
