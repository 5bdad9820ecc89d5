"""The folder as a Space: what the hub reads of it, and how visitors are kept apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from gradio_app.visitors import COOKIE
from tests.app.servers import environment

FOLDER = Path(__file__).parents[2] / "gradio_app"


@pytest.fixture(scope="module")
def front_matter():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_accepts(front_matter):
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert front_matter["sdk"] == "gradio"
    assert front_matter["sdk_version"] == metadata.version("gradio")
    assert (FOLDER / front_matter["app_file"]).is_file()
    assert isinstance(front_matter["python_version"], str)
    assert len(front_matter["short_description"]) <= 60
    assert {front_matter["colorFrom"], front_matter["colorTo"]} <= colours


def test_requirements_leave_out_what_the_space_brings():
    lines = (FOLDER / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[^\w-]", line)[0] for line in lines if not line.startswith("#")}
    assert "lightning-peft" in names
    assert not names & {"gradio", "spaces", "huggingface_hub"}


def test_the_folder_runs_as_the_root_of_a_space(tmp_path, free_port):
    """Copied elsewhere and started as the hub does it, the copy is what runs."""
    copy = tmp_path / "repository"
    subprocess.run(["cp", "-r", str(FOLDER), str(copy)], check=True)
    heading = json.loads((copy / "texts/en/home.json").read_text())
    (copy / "texts/en/home.json").write_text(json.dumps(heading | {"heading": "A copy"}))
    source = (copy / "app.py").read_text()
    started = source.replace('"0.0.0.0", 7860', f'"127.0.0.1", {free_port}')
    assert started != source
    (copy / "app.py").write_text(started)
    env = environment(tmp_path) | {"SPACE_ID": "someone/studio"}
    with subprocess.Popen(
        [sys.executable, "app.py"], cwd=copy, env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert f"127.0.0.1:{free_port}" in process.stdout.readline()
        url = f"http://127.0.0.1:{free_port}"
        with urllib.request.urlopen(f"{url}/config", timeout=10) as answer:
            assert "A copy" in answer.read().decode()
        process.terminate()
        assert process.wait(20) == 0


@pytest.fixture
def free_port():
    from gradio_app.serving import free_port

    return free_port("127.0.0.1")


def cookie_set_by(server, **headers):
    request = urllib.request.Request(server.url, headers={"Accept": "text/html", **headers})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers["set-cookie"]


def test_every_new_visitor_gets_a_cookie_of_their_own_and_keeps_it(space, site):
    values = [cookie_set_by(space) for _ in range(2)]
    assert values[0] != values[1]
    for value in values:
        assert re.match(rf"{COOKIE}=[0-9a-f]{{32}}; ", value)
        assert {"HttpOnly", "Secure", "SameSite=None", "Partitioned"} <= set(value.split("; "))
    assert cookie_set_by(space, Cookie=f"{COOKIE}={'a' * 32}") is None
    # A laptop sets none.
    assert cookie_set_by(site) is None
