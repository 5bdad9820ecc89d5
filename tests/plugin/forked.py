"""Fresh interpreters that share one slow import: each scenario runs in a fork of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# Without Lightning, without lightning_peft, and without having computed: no thread must be running.
DRIVER = """
import json, os, sys, traceback
import bitsandbytes, peft, torch, transformers
assert not {"lightning", "pytorch_lightning", "lightning_peft"} & sys.modules.keys()
results = {}
for name, code in json.load(sys.stdin).items():
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1), os.dup2(write, 2)
        try:
            torch.set_num_threads(1)
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        text = pipe.read()
    results[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]
print(json.dumps(results))
"""


def environment() -> dict[str, str]:
    """Environment in which scripts find the modules of tests, and seed themselves."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_forked(scenarios: dict[str, str], folder: Path) -> dict[str, tuple[int, str]]:
    """Returns exit code and output of each scenario; a negative code is a signal."""
    run = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(scenarios),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(),
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return {name: tuple(result) for name, result in json.loads(run.stdout).items()}
