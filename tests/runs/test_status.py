import subprocess
import sys
import time

from lightning_peft.runs.status import StatusFile, read_status

WRITES = """
import sys, time
from pathlib import Path
from lightning_peft.runs.status import StatusFile
file = StatusFile(Path(sys.argv[1]), "fit")
file.update(state="running", step=3)
print("written", flush=True)
time.sleep(60)
"""


def test_the_status_of_this_process(tmp_path):
    path = tmp_path / "status.json"
    assert read_status(path) is None
    file = StatusFile(path, "test", heartbeat=0.05)
    first = read_status(path)
    assert (first.state, first.kind, first.step) == ("preparing", "test", 0)
    deadline = time.monotonic() + 20
    while read_status(path).updated == first.updated and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read_status(path).updated > first.updated
    file.update(state="finished", step=7)
    file.close()
    assert (read_status(path).state, read_status(path).step) == ("finished", 7)
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_process_that_is_gone_has_crashed_and_one_that_ended_well_has_not(tmp_path):
    path = tmp_path / "status.json"
    command = [sys.executable, "-c", WRITES, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    assert read_status(path).state == "running"
    process.kill()
    # Killed, and not waited for yet: a zombie.
    deadline = time.monotonic() + 20
    while read_status(path).state == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read_status(path).state == "crashed"
    process.communicate()
    status = read_status(path)
    assert (status.state, status.step, status.eta_seconds) == ("crashed", 3, None)


def test_an_id_that_another_process_has_now_is_another_process(tmp_path):
    path = tmp_path / "status.json"
    file = StatusFile(path, "fit")
    file.update(state="running", process_started=file.status.process_started - 100)
    file.close()
    assert read_status(path).state == "crashed"


def test_fields_of_later_versions_are_passed_over(tmp_path):
    path = tmp_path / "status.json"
    path.write_text('{"state": "queued", "colour": "blue"}')
    assert read_status(path).state == "queued"
