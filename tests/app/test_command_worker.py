"""The process that answers: as the command line does, in order, and again after it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from gradio_app.recipe.command_worker import CommandWorker, environment
from gradio_app.runs.environment import training_environment
from gradio_app.settings import Settings
from tests.app.servers import environment as server_environment

pytestmark = pytest.mark.long

PREVIEW = ["preview", "--json", "--config", "sft-lora", "--config", "small/sft", "--limit=40"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    made = CommandWorker(Settings(runs=tmp_path_factory.mktemp("runs")))
    yield made
    made.close()


def test_the_answer_is_that_of_the_command_line(worker, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft.cli", *PREVIEW],
        env=server_environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    answer = worker.run(PREVIEW, 120)
    assert answer.code == done.returncode == 0
    assert answer.out == done.stdout
    assert answer.json()["rows"] == 40


def test_bad_input_is_reported_and_the_process_goes_on(worker):
    worker.run(["recipes"], 120)
    before = worker.pid
    for words in (["nonsense"], ["plan"], ["preview", "--data=no-such.jsonl"], ["--version"]):
        answer = worker.run(words, 60)
        assert answer.code == (0 if words == ["--version"] else 2), words
        assert (answer.out if words == ["--version"] else answer.err).strip()
    assert worker.pid == before


def test_a_killed_process_is_started_again(worker):
    worker.run(["--version"], 120)
    before = worker.pid
    os.kill(before, signal.SIGKILL)
    assert worker.run(["--version"], 120).code == 0
    assert worker.pid != before


def test_what_takes_too_long_is_ended_and_said(worker):
    answer = worker.run(PREVIEW, 0.001)
    assert answer.code is None
    assert "0.001 seconds" in answer.err
    assert worker.pid is None
    assert worker.run(["--version"], 120).code == 0


def test_many_at_once_are_answered_each_with_its_own(worker):
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = worker.run([f"nonsense-{number}"], 60).err

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"nonsense-{number}" in err for number, err in found.items())
    assert len(found) == 8


def test_an_idle_process_ends_and_a_closed_one_answers_nothing():
    made = CommandWorker(Settings(), idle_seconds=0.05)
    assert made.run(["--version"], 120).code == 0
    for _ in range(2000):
        if made.pid is None:
            break
        threading.Event().wait(0.005)
    assert made.pid is None
    made.close()
    assert made.run(["--version"], 1).code is None


def test_strangers_do_not_get_the_token_of_the_owner():
    outer = {"HF_TOKEN": "hf_x", "HF_HOME": "/h", "PATH": "/bin", "AWS_SECRET_ACCESS_KEY": "s"}
    outer |= {"HUGGING_FACE_HUB_TOKEN": "hf_y", "WANDB_API_KEY": "w"}
    kept = environment(Settings(), outer)
    assert kept["HF_TOKEN"] == "hf_x"
    assert kept["HUGGING_FACE_HUB_TOKEN"] == "hf_y"
    # For runs; checks log nothing.
    assert "WANDB_API_KEY" not in kept
    assert training_environment(Settings(), outer)["WANDB_API_KEY"] == "w"
    assert "AWS_SECRET_ACCESS_KEY" not in kept
    kept = environment(Settings(space=True), outer)
    assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"} & set(kept)
    assert kept["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert kept["HF_HOME"] == "/h"
