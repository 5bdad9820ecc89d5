"""Commands in a folder of their own: in this process, which is quick, or in a new one."""

import os
import subprocess
import sys

import pytest

from lightning_peft.cli import main


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
        streams = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, streams.out, streams.err)

    return run


@pytest.fixture
def new_process(tmp_path):
    def run(*words, **environment):
        command = [sys.executable, "-m", "lightning_peft.cli", *words]
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True
        )

    return run
