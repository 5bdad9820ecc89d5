"""``lightning-peft doctor`` as a program, on this machine and on spoiled ones."""

import json
import os
import subprocess
import sys

import pytest

from lightning_peft.cli import main

NAMES = [
    "python",
    "lightning releases",
    "packages",
    "packages together",
    "torch",
    "device",
    "bf16",
    "bitsandbytes 4-bit",
    "bitsandbytes 8-bit",
    "optimizer paged_adamw_32bit",
    "optimizer adamw_8bit",
    "compiler",
    "folder",
    "hub",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """It writes a file for a moment, which tests of another process would take for a leftover."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def doctor(tmp_path):
    """Runs the command in an empty folder, with ``tmp_path / "first"`` in front of all packages."""
    folder = tmp_path / "here"
    folder.mkdir()

    def run(*arguments):
        path = os.pathsep.join([str(tmp_path / "first"), *filter(None, sys.path)])
        return subprocess.run(
            [sys.executable, "-m", "lightning_peft.cli", "doctor", *arguments],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_this_machine_can_train(new_process, tmp_path):
    done = new_process("doctor", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"version", "passed", "checks"}
    assert found["passed"] is True
    assert [check["name"] for check in found["checks"]] == NAMES
    for check in found["checks"]:
        assert set(check) == {"name", "status", "detail", "remedy", "seconds"}
        assert check["status"] in ("ok", "warning", "skipped")
        assert bool(check["remedy"]) == (check["status"] == "warning")
    assert found["checks"][-1]["status"] == "skipped"
    assert "HF_HUB_OFFLINE is set" in found["checks"][-1]["detail"]
    assert not list(tmp_path.iterdir())


def test_a_bitsandbytes_that_does_not_load_is_named_with_the_fix(doctor, tmp_path):
    package = tmp_path / "first" / "bitsandbytes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import pathlib, time\n"
        "once = pathlib.Path(__file__).with_name('once')\n"
        "if not once.exists(): once.touch(); time.sleep(2.2)\n"
        "print('noise')\n"
        "raise RuntimeError('no library\\nfor CUDA')\n"
    )
    done = doctor("--device", "cpu", "--no-hub")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    at = lines.index("FAILED  bitsandbytes 4-bit: RuntimeError: no library for CUDA")
    assert lines[at + 1].startswith("        fix: Install bitsandbytes")
    assert any(line.startswith("warning bitsandbytes 8-bit: ") for line in lines)
    assert "ok      device: cpu" in done.stdout
    assert "--      hub: --no-hub" in lines
    assert lines[-1] == "Broken: bitsandbytes 4-bit."
    assert "\x1b" not in done.stdout
    assert "checking bitsandbytes 4-bit ..." in done.stderr
    assert "noise" in done.stderr
    assert "noise" not in done.stdout
    assert "Traceback" not in done.stderr


def test_nothing_is_imported_beside_a_compromised_release(doctor, tmp_path):
    folder = tmp_path / "first" / "lightning-2.6.3.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning\nVersion: 2.6.3\n")
    for name in ("torch", "lightning", "huggingface_hub"):
        (tmp_path / "first" / f"{name}.py").write_text("print('loaded ' + __name__)\n")
    done = doctor("--json", "--hub")
    assert done.returncode == 1
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert list(found) == NAMES
    assert found["lightning releases"]["status"] == "failed"
    assert found["packages"]["status"] == "failed"
    for name in [*NAMES[4:12], "hub"]:
        assert found[name]["status"] == "skipped"
    assert "nothing else is imported" in found["hub"]["detail"]
    assert "loaded" not in done.stdout + done.stderr


def test_a_folder_that_fails_is_an_exit_code(tmp_path, capsys):
    (tmp_path / "taken").touch()
    arguments = ["doctor", "--device", "cpu", "--no-hub", "--folder", str(tmp_path / "taken")]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "FAILED  folder: " in shown
    assert shown.endswith("Broken: folder.\n")


def test_what_depends_on_a_failed_check_is_skipped(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["doctor", "--device", "cuda", "--no-hub", "--json"]) == 1
    found = {c["name"]: c["status"] for c in json.loads(capsys.readouterr().out)["checks"]}
    assert found["torch"] == "failed"
    assert {found[name] for name in NAMES[5:12]} == {"skipped"}
    assert found["folder"] == "ok"


def test_a_terminal_gets_colours_and_the_same_words(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "--device", "cpu", "--no-hub"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[32mok     \x1b[0m \x1b[1mpython\x1b[0m: " in shown
    assert "Everything that training needs works" in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--device", "tpu"], "tpu"), (["--fodler", "x"], "--fodler"), (["extra"], "extra")],
)
def test_bad_arguments_are_named(arguments, named, refused):
    assert named in refused("doctor", *arguments)
