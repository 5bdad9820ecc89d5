"""Folders that cannot be written to, and hubs that do not answer."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from lightning_peft.doctor.places import check_folder


def in_process(code, **environment):
    """Runs code that leaves a finding in ``found``; the hub's settings are read on import."""
    program = f"import json\n{code}\nprint(json.dumps([found.status, found.detail, found.remedy]))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def ask(address, needed=False, **environment):
    code = (
        "from lightning_peft.doctor import places\n"
        f"places._TIMEOUT_SECONDS = 0.5\nfound = places.check_hub({needed})"
    )
    return in_process(code, HF_ENDPOINT=address, NO_PROXY="127.0.0.1", **environment)


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path):
    found = check_folder(tmp_path)
    assert found.status == "ok"
    assert "writable" in found.detail
    later = check_folder(tmp_path / "runs" / "of" / "mine")
    assert later.status == "ok"
    assert f"(in {tmp_path})" in later.detail
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "runs"])
def test_a_file_in_the_way_is_found(tmp_path, below):
    (tmp_path / "taken").touch()
    found = check_folder(tmp_path / "taken" / below)
    assert found.status == "failed"
    assert "taken is a file" in found.detail
    assert "default_root_dir" in found.remedy


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux")
def test_a_folder_that_takes_no_files_is_found():
    found = check_folder(Path("/proc/self"))
    assert found.status == "failed"
    assert "Error" in found.detail


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of Unix")
def test_a_folder_that_takes_no_data_is_found(tmp_path):
    code = (
        "import resource\nfrom pathlib import Path\n"
        "from lightning_peft.doctor.places import check_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"found = check_folder(Path({str(tmp_path)!r}))"
    )
    status, detail, remedy = in_process(code)
    assert status == "failed"
    assert "OSError" in detail
    assert remedy
    assert not list(tmp_path.iterdir())


def test_little_room_is_found(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2**40, 2**40 - 2**30, 2**30))
    found = check_folder(tmp_path)
    assert found.status == "warning"
    assert "1.0 GiB free" in found.detail
    assert "Make room" in found.remedy


@pytest.fixture
def hub():
    """Starts a server on the loopback that answers everything with one status."""
    servers = []

    def start(status):
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *given):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("code", "status"), [(404, "ok"), (401, "ok"), (500, "warning")])
def test_a_hub_that_answers_is_there_unless_it_is_broken(hub, code, status):
    address = hub(code)
    found = ask(address)
    assert found[0] == status
    assert address in found[1]
    assert ("error 500" in found[1]) == (code == 500)


@pytest.fixture
def silent():
    """Gives the address of a port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_found_and_is_a_fault_where_it_is_needed(silent):
    status, detail, remedy = ask(silent, needed=True)
    assert status == "failed"
    assert "Timeout" in detail
    assert "HTTPS_PROXY" in remedy


def test_a_hub_that_refuses_is_found():
    with socket.socket() as bound:
        # Bound and not listening: nobody else gets the port, and connections are refused.
        bound.bind(("127.0.0.1", 0))
        status, detail, _ = ask(f"http://127.0.0.1:{bound.getsockname()[1]}")
    assert status == "warning"
    assert "Connect" in detail


@pytest.mark.parametrize(("needed", "status"), [(False, "skipped"), (True, "failed")])
def test_offline_is_respected_and_said(silent, needed, status):
    found = ask(silent, needed, HF_HUB_OFFLINE="1")
    assert found[0] == status
    assert "HF_HUB_OFFLINE is set" in found[1]
    assert "was not asked" in found[1]
    assert ("Unset HF_HUB_OFFLINE" in found[2]) == needed
