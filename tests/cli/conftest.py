"""Commands in a folder of their own: in this process, which is quick, or in a new one."""

import json
import subprocess

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
def new_process(tmp_path, program):
    def run(*words, **options):
        code, out, err = program.run(tmp_path, *map(str, words), **options)
        return subprocess.CompletedProcess(words, code, out, err)

    return run


@pytest.fixture
def exported(capsys):
    """Runs the command in this process, which has imported all that takes seconds."""

    def run(run, output, kind, *words):
        capsys.readouterr()
        given = ["export", f"mine={run}", str(output), "--format", kind, "--json", *words]
        assert main(given) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run
