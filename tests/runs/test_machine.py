"""What a run records of its process."""

import subprocess
import sys

from lightning_peft.runs.machine import peak_memory

ASK = "from lightning_peft.runs.machine import peak_memory; print(peak_memory()['process_bytes'])"


def test_the_peak_is_that_of_the_process_and_not_of_its_parent():
    held = bytearray(1_200_000_000)
    found = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    # The parent holds more than torch's imports take.
    assert 50_000_000 < int(found.stdout) < len(held)
    assert peak_memory()["process_bytes"] >= len(held)


def test_the_peak_stays_when_memory_is_given_back():
    held = bytearray(300_000_000)
    most = peak_memory()["process_bytes"]
    del held
    assert peak_memory()["process_bytes"] >= most
