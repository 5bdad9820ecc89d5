"""Runs in the visitor's own account: against a stand-in of the hub, and the job's script for real.

No real job could be run: what the stand-in answers is what the client library reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr
import pytest
from huggingface_hub import HfApi
from starlette.requests import Request

from gradio_app.errors import UserError
from gradio_app.pages import hub_job
from gradio_app.recipe.edits import demo_recipe
from gradio_app.runs import hf_jobs
from gradio_app.runs.store import RunStore
from gradio_app.settings import Settings
from gradio_app.studio import Studio, create_executors
from lightning_peft.demo.real_base import SMOLLM2_PLACE
from lightning_peft.runs.folder import RunFolder
from tests.app.runs import until
from tests.app.servers import ROOT, environment

TOKEN = "hf_aTokenOfTheVisitor"
RECIPE = "model: {class_path: lightning_peft.tasks.CausalLM, init_args: {model: a/b}}\n"
ADDRESS = "https://huggingface.co/spaces/a/b/resolve/main/lightning_peft-1-py3-none-any.whl"
WHEEL = f"lightning-peft[gguf] @ {ADDRESS}#sha256={'0' * 64}"
SCRIPT = ROOT / "gradio_app/runs/job_script.py"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that jobs need."""

    posted: ClassVar[list[tuple[str, Any]]] = []
    tokens: ClassVar[list[str]] = []
    logs: ClassVar[list[str]] = []
    stage: ClassVar[str] = "RUNNING"

    def job(self) -> dict[str, Any]:
        owner = {"id": "1", "name": "visitor", "type": "user"}
        return {"id": "job1", "owner": owner, "status": {"stage": Hub.stage}}

    def do_GET(self) -> None:
        Hub.tokens.append(self.headers.get("authorization", ""))
        if self.path.startswith("/api/whoami"):
            self.answer({"name": "visitor", "type": "user"})
        elif self.path == "/api/jobs/hardware":
            self.answer(HARDWARE)
        elif "/logs" in self.path:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for line in Hub.logs:
                self.wfile.write(f"data: {json.dumps({'data': line})}\n\n".encode())
        else:
            self.answer(self.job())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        Hub.posted.append((self.path, json.loads(body) if body else None))
        self.answer(self.job())

    def answer(self, content: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        pass


def _machine(name: str, cost: float, accelerator: Any = None) -> dict[str, Any]:
    return {
        "name": name,
        "prettyName": name.upper(),
        "cpu": "2 vCPU",
        "ram": "16 GB",
        "accelerator": accelerator,
        "unitCostMicroUSD": round(cost * 1e6),
        "unitCostUSD": cost,
        "unitLabel": "minute",
    }


GRAPHICS = {
    "type": "gpu",
    "model": "T4",
    "quantity": "1",
    "vram": "16 GB",
    "manufacturer": "NVIDIA",
}
HARDWARE = [_machine("t4-small", 0.01, GRAPHICS), _machine("cpu-basic", 0.001)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    Hub.posted, Hub.tokens, Hub.logs, Hub.stage = [], [], [], "RUNNING"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_jobs, "_api", lambda token: HfApi(endpoint=url, token=token))
    yield Hub
    server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.at(tmp_path / "runs/20260101-000000-mine-0000")
    made.recipe.write_text(RECIPE)
    return made


def start(folder: RunFolder) -> hf_jobs.Job:
    return hf_jobs.start_job(folder, TOKEN, "t4-small", 45, "visitor/mine", [WHEEL, "torch==2.13"])


def test_machines_come_with_their_price(hub):
    found = hf_jobs.list_hardware(TOKEN)
    assert [one.flavor for one in found] == ["cpu-basic", "t4-small"]
    assert found[1].title == "T4-SMALL, 1 x T4, 16 GB"
    assert found[1].dollars_per_hour == pytest.approx(0.6)
    assert hf_jobs.max_cost(found[1], 45) == pytest.approx(0.45)


def test_a_run_is_handed_over_with_its_recipe_and_a_secret_token(hub, folder):
    job = start(folder)
    path, body = hub.posted[0]
    assert path == "/api/jobs/visitor"
    assert body["flavor"] == "t4-small"
    assert body["timeoutSeconds"] == 45 * 60
    assert body["environment"] == {"RECIPE": RECIPE, "PUSH_TO": "visitor/mine"}
    assert body["secrets"] == {"HF_TOKEN": TOKEN}
    installed = ["--with", WHEEL, "--with", "torch==2.13"]
    assert body["command"][:-1] == ["uv", "run", *installed, "python", "-c"]
    assert body["command"][-1] == SCRIPT.read_text()
    assert hf_jobs.job_of(folder) == job
    assert hf_jobs.status_of(folder).state == "preparing"
    for file in folder.path.rglob("*"):
        assert file.is_dir() or TOKEN not in file.read_text()


def test_a_job_installs_what_the_space_does(tmp_path):
    (tmp_path / "requirements.txt").write_text(f"# a note\n{WHEEL}\ntorch==2.13\n")
    assert hf_jobs.job_packages(tmp_path) == [WHEEL, "torch==2.13"]


@pytest.mark.parametrize("line", ["lightning-peft", "./lightning_peft-1-py3-none-any.whl", None])
def test_no_job_installs_a_name_or_a_file(line, tmp_path):
    if line is not None:
        (tmp_path / "requirements.txt").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"hub_job\.no_wheel"):
        hf_jobs.job_packages(tmp_path)


def test_files_of_this_machine_are_refused(hub, folder, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("{}")
    folder.recipe.write_text(f"data: {{init_args: {{data: {data}}}}}\n")
    with pytest.raises(UserError, match=r"mine\.jsonl"):
        start(folder)
    assert not hub.posted


def test_the_folder_is_rebuilt_from_the_log_and_each_line_counts_once(hub, folder):
    start(folder)

    def log_line(name: str, content: Any) -> str:
        return hf_jobs.LINE_PREFIX + json.dumps({"file": name, "line": json.dumps(content)})

    status = {"state": "running", "step": 3, "total_steps": 9, "pid": 1, "unknown": 1}
    hub.logs[:] = [
        "installing",
        log_line("status.json", status),
        log_line("metrics.jsonl", {"step": 3}),
    ]
    hf_jobs.refresh(folder, TOKEN)
    hub.logs += [log_line("metrics.jsonl", {"step": 4}), "token hf_abcdefghijklmno"]
    hf_jobs.refresh(folder, TOKEN)
    assert [row["step"] for row in folder.rows(folder.metrics)] == [3, 4]
    assert hf_jobs.status_of(folder).step == 3
    assert folder.log.read_text() == "installing\ntoken [hidden]\n"
    hub.stage = "CANCELED"
    hf_jobs.refresh(folder, TOKEN)
    assert hf_jobs.status_of(folder).state == "stopped"
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("name", ["../../evil", "app.json", "job.json", "recipe.yaml", 3, None])
def test_a_log_writes_no_other_files(folder, name):
    before = sorted(folder.path.rglob("*"))
    line = hf_jobs.LINE_PREFIX + json.dumps({"file": name, "line": '{"a": 1}'})
    hf_jobs.rebuild_folder(
        folder, [line, hf_jobs.LINE_PREFIX + "no json", hf_jobs.LINE_PREFIX + "[]"]
    )
    assert sorted(folder.path.rglob("*")) == sorted([*before, folder.log])
    assert folder.recipe.read_text() == RECIPE
    assert not (folder.path.parent.parent / "evil").exists()


def test_a_job_can_be_cancelled(hub, folder):
    start(folder)
    hf_jobs.cancel(folder, TOKEN)
    assert hub.posted[-1][0] == "/api/jobs/visitor/job1/cancel"


def test_the_page_shows_a_job_and_ends_it_with_its_owners_token(hub, tmp_path):
    settings = Settings.on_a_space(tmp_path)
    settings.runs.mkdir(parents=True)
    store = RunStore(settings, create_executors(settings))
    run = store.create("hf-visitor", RECIPE, "Mine")
    start(run.folder)
    run = store.update_metadata(run, where=hf_jobs.EXECUTOR, launched=run.created)
    assert run.status.state == "preparing"
    assert run.active
    executor = store.executor(run)
    with pytest.raises(UserError, match=r"hub_job\.sign_in"):
        executor.stop(run)
    status = {"state": "running", "step": 5, "pid": 1, "process_started": 1.0, "started": 9e9}
    hub.logs[:] = [
        hf_jobs.LINE_PREFIX + json.dumps({"file": "status.json", "line": json.dumps(status)})
    ]
    executor.look(run.folder, TOKEN)
    until(lambda: store.get("hf-visitor", run.id).status.step == 5)
    # Its process is on no machine of ours, which does not make it crashed.
    assert store.get("hf-visitor", run.id).status.state == "running"
    executor.stop(run)
    until(lambda: hub.posted[-1][0].endswith("/cancel"))
    with pytest.raises(UserError, match=r"errors\.no_such_run"):
        store.get("v-somebody", run.id)


def test_two_jobs_of_one_name_have_two_names(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_jobs, "job_packages", lambda: [WHEEL])
    studio = Studio(Settings.on_a_space(tmp_path))
    signed_in = {"access_token": TOKEN, "expires_at": time.time() + 600}
    signed_in["userinfo"] = {"preferred_username": "visitor"}
    scope = {"type": "http", "headers": [], "session": {"oauth_info": signed_in}}
    request, begin = gr.Request(Request(scope)), hub_job._start_handler(studio)
    name = "a name of more than sixty characters, which a run of this machine keeps whole"
    recipe = demo_recipe().replace(SMOLLM2_PLACE, "HuggingFaceTB/SmolLM2-135M-Instruct")
    for _ in range(2):
        begin(request, recipe, name, "t4-small", 45, "visitor/mine", True)
    names = {run.name for run in studio.store.list("hf-visitor")}
    assert names == {name, f"{name[:75]}-2"}
    studio.close()


@pytest.mark.long
def test_the_script_of_the_job_trains_and_its_log_holds_the_run(tmp_path):
    """As the hub runs it: text given to Python, in an empty folder, with two variables."""
    recipes = ROOT / "recipes"
    recipe = tmp_path / "both.yaml"
    words = ["fit", f"--config={recipes}/sft-lora.yaml", f"--config={recipes}/small/sft.yaml"]
    words += ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--print_config"]
    env = environment(tmp_path) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_peft.cli", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    recipe.write_text(done.stdout)
    there = tmp_path / "there"
    there.mkdir()
    env |= {"RECIPE": recipe.read_text(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT.read_text()]
    done = subprocess.run(command, env=env, cwd=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rebuilt = RunFolder.at(tmp_path / "rebuilt")
    hf_jobs.rebuild_folder(rebuilt, done.stdout.splitlines())
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"):
        assert (rebuilt.path / name).read_text() == (there / "run" / name).read_text()
    for name in ("status.json", "result.json", "provenance.json"):
        assert json.loads((rebuilt.path / name).read_text()) == json.loads(
            (there / "run" / name).read_text()
        )
    assert hf_jobs.status_of(rebuilt).state == "finished"
    assert os.listdir(there / "run/checkpoints")
