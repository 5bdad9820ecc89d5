"""Attacks on a real server by raw HTTP: files, uploads, handlers, sign-in, what browsers keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gradio_app.serving import is_loopback, launch_options
from gradio_app.settings import Settings
from tests.app.attacking import Call, Handler, attack, handlers_of
from tests.app.servers import ROOT, Server, environment

SECRET = "hf_thisIsASecretOfTheVisitor"
# What could have a file read.
READS = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "--config=/etc/passwd",
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
]
HOSTILE = [
    *READS,
    "..",
    "'; touch /tmp/pwned; '",
    "$(touch /tmp/pwned)",
    "!!python/object/apply:os.system ['touch /tmp/pwned']",
    "model: {class_path: os.system, init_args: {command: 'touch /tmp/pwned'}}",
    "<img src=x onerror=alert(1)>",
    "\0",
    SECRET,
    None,
    -1,
    1e308,
    [],
]
# What buttons in a page's own HTML tell, and what addresses of pages ask for.
CLICKED = ("act", "run", "export", "fix", "setting")
ASKED = ("run", "runs", "from", "recipe", "method")


@pytest.fixture(scope="module")
def site(serve) -> Server:
    return serve(trainer="fake", limits={"upload_bytes": 200_000})


@pytest.fixture(scope="module")
def config(client) -> dict[str, Any]:
    return client.get("/config").json()


# Files


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../etc/passwd", "server.log", "runs/x/status.json", "%2e%2e/server.log"],
)
def test_no_file_of_the_machine_is_served(client, site, path):
    for name in (path, str(site.folder / path)):
        answer = client.get(f"/gradio_api/file={name}")
        assert answer.status_code in (403, 404), name


def test_a_run_is_not_served_as_a_file_even_to_those_who_know_its_path(client, site):
    run = site.runs / "20260101-000000-mine-0000"
    run.mkdir(exist_ok=True)
    (run / "train.log").write_text("secret")
    answer = client.get(f"/gradio_api/file={run}/train.log")
    assert answer.status_code == 403
    assert "secret" not in answer.text


def test_an_address_is_not_fetched_for_a_visitor(client):
    answer = client.get("/gradio_api/file=http://127.0.0.1:1/secret")
    assert answer.status_code in (400, 403, 404)


# Uploads


def test_an_upload_above_the_limit_is_refused(client):
    answer = client.post("/gradio_api/upload", files={"files": ("a.jsonl", b"x" * 300_000)})
    assert answer.status_code == 413


def test_an_upload_never_leaves_the_folder_for_uploads(client, site):
    name = "../../../../pwned.jsonl"
    answer = client.post("/gradio_api/upload", files={"files": (name, b"{}")})
    uploads = site.folder / "tmp"
    if answer.status_code == 200:
        assert Path(answer.json()[0]).resolve().is_relative_to(uploads)
    else:
        assert 400 <= answer.status_code < 500
    # Four folders up from wherever the upload would have been put.
    around = [*site.folder.parents[:4], *site.folder.rglob("*")]
    found = [one / "pwned.jsonl" for one in around if (one / "pwned.jsonl").exists()]
    assert all(one.is_relative_to(uploads) for one in found)


# Handlers


def hostile(one: Handler, values: Sequence[Any]) -> list[Call]:
    """Returns calls that put each of the values into each place of a visitor."""
    if not one.given and not one.event and one.inputs:
        return [Call([SECRET] * one.inputs)]
    made = []
    for number, value in enumerate(values):
        data = [values[(number + place) % len(values)] for place in range(one.inputs)]
        event = dict.fromkeys(CLICKED, value) if one.event else None
        query = {} if one.inputs else dict.fromkeys(ASKED, str(value))
        made.append(Call(data, event, query))
    return made


@pytest.mark.parametrize("all_values", [False, pytest.param(True, marks=pytest.mark.long)])
def test_no_handler_reads_a_file_or_shows_its_inside_to_an_attacker(client, site, all_values):
    """Every handler of every page, called with hostile values in every place.

    By default, with those that could have a file read, and with one other.
    """

    def calls(one: Handler, _: int) -> list[Call]:
        other = len(READS) + one.number % (len(HOSTILE) - len(READS))
        return hostile(one, HOSTILE if all_values else [*READS, HOSTILE[other]])

    def check(one: Handler, text: str) -> None:
        # Or it was turned away at the door.
        assert "Reload it" not in text, one
        for word in ("root:", "Traceback", str(site.folder), str(ROOT)):
            place = text.find(word)
            assert place < 0, f"{one} shows {word!r}: {text[max(0, place - 200) : place + 200]}"

    groups = handlers_of(site, client)
    assert sum(map(len, groups)) > 100
    attack(client, groups, calls, check)
    assert not Path("/tmp/pwned").exists()
    assert client.get("/").status_code == 200


# Sign-in and reach


def test_with_a_password_nothing_is_shown_without_it(serve):
    server = serve(trainer="fake", password="correct horse battery")
    with server.client() as client:
        for path in ("/config", "/gradio_api/info", "/gradio_api/file=x"):
            assert client.get(path).status_code == 401, path
        body = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert client.post("/gradio_api/queue/join", json=body).status_code == 401
        upload = client.post("/gradio_api/upload", files={"files": ("a.jsonl", b"{}")})
        assert upload.status_code == 401
        form = {"username": "studio", "password": "wrong"}
        assert client.post("/login", data=form).status_code == 400
        form["password"] = "correct horse battery"
        assert client.post("/login", data=form).status_code == 200
        assert client.get("/config").status_code == 200


@pytest.mark.parametrize("word", ["", "short"])
def test_other_machines_need_a_password_to_be_let_in(tmp_path, word):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft.cli", "app", "--host", "0.0.0.0", "--no-open"],
        env=environment(tmp_path) | {"LIGHTNING_PEFT_PASSWORD": word},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"it has {len(word)}" in done.stderr
    assert "LIGHTNING_PEFT_PASSWORD" in done.stderr


def test_what_is_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"))


def test_the_server_listens_to_this_machine_alone(site):
    ports = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    wanted = f"{site.port:04X}"
    listening = {line[1].split(":")[0] for line in ports if line[1].endswith(f":{wanted}")}
    assert listening == {"0100007F"}


def test_the_launch_is_closed_where_gradio_is_open(tmp_path):
    options = launch_options(Settings.on_this_machine(tmp_path, tmp_path, None), None)
    assert options["share"] is False
    assert options["show_error"] is False
    assert options["run_history"] is False
    assert options["enable_monitoring"] is False
    assert options["mcp_server"] is False
    assert options["strict_cors"] is True
    assert options["allowed_paths"] == []
    assert options["max_file_size"] == 500_000_000


def test_other_sites_cannot_act_through_the_visitors_browser(client):
    answer = client.get("/config", headers={"Origin": "https://evil.example"})
    assert answer.headers.get("access-control-allow-origin") != "https://evil.example"
    assert client.get("/monitoring/summary").status_code in (401, 403, 404)


def test_no_telemetry_and_no_paths_from_the_environment(tmp_path):
    source = (
        "import os; from gradio_app.serving import prepare_environment; prepare_environment();"
        "print(os.environ['GRADIO_ANALYTICS_ENABLED'], 'GRADIO_ALLOWED_PATHS' in os.environ)"
    )
    env = {**os.environ, "GRADIO_ALLOWED_PATHS": "/", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", source], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


# What the known holes of such pages teach: each name is that of the advisory.


def _sources() -> list[Path]:
    return [file for file in (ROOT / "gradio_app").rglob("*.py") if "__pycache__" not in str(file)]


@pytest.mark.parametrize(
    ("advisory", "words"),
    [
        ("CVE-2024-52803, CVE-2024-32022: a shell", ["shell=True", "os.system", "os.popen"]),
        (
            "CVE-2025-53002, CVE-2025-46567: pickle",
            ["import pickle", "pickle.load", "torch.load", "joblib"],
        ),
        ("CVE-2025-61784: fetching for a visitor", ["requests.get", "urlopen", "httpx.get"]),
        ("CVE-2026-28416: other people's Spaces", ["gr.load("]),
        ("GHSA-j36p-7w88-g82j: the file explorer", ["FileExplorer"]),
        ("CVE-2025-48889: flagging copies files", ["flagging"]),
        ("yaml that makes objects", ["yaml.load(", "unsafe_load", "full_load"]),
        ("evaluating what a visitor wrote", ["eval(", "exec("]),
    ],
)
def test_what_opened_other_pages_is_not_used_here(advisory, words):
    for file in _sources():
        text = file.read_text(encoding="utf-8").replace("exec_module(", "")
        for word in words:
            assert word not in text, f"{advisory}: {file.name} has {word}"


def test_sign_in_exists_on_a_space_alone(config):
    """CVE-2026-27167: off a Space, Gradio's sign-in would hand out the token of the machine."""
    assert not any(one["type"] == "loginbutton" for one in config["components"])


def test_versions_are_past_the_known_holes():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'app = ["gradio>=6.31,<7"]' in text
    pins = dict(
        line.split(";")[0].strip().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    # CVE-2026-24747 of torch, CVE-2026-9856 of transformers.
    assert tuple(map(int, pins["torch"].split(".")[:2])) >= (2, 10)
    assert tuple(map(int, pins["transformers"].split(".")[:2])) >= (5, 10)


def test_a_browser_keeps_no_secret(site, visit):
    page = visit(site.url)
    page.locator("h1").wait_for()
    stored = json.dumps(page.evaluate("({...localStorage, ...sessionStorage})"))
    assert "run-history" not in stored
    assert "hf_" not in stored
