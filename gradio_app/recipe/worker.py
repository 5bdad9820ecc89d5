"""A process that has imported all of the library already, and runs its commands one by one.

It reads a JSON line for each command, ``{"id": 1, "arguments": ["plan", ...]}``, and answers with
one: ``{"id": 1, "code": 0, "out": "...", "err": "..."}``. The command ``import`` only imports what
the others take seconds for. It ends with its input.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import IO

IMPORT = "import"
_HEAVY = (
    "lightning_peft.cli.preview",
    "lightning_peft.data.preview",
    "lightning_peft.plan.survey",
    "lightning_peft.plugin.lightning_cli",
    "lightning_peft.tasks",
    "lightning.pytorch.cli",
)


def answer(arguments: list[str]) -> tuple[int, str, str]:
    """Runs a command; returns its exit code and what it wrote to both outputs."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if arguments == [IMPORT]:
                return _prepare(), "", ""
            code = int(import_module("lightning_peft.cli").main(arguments))
        except SystemExit as stop:
            # argparse ends the process; this one goes on.
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except Exception:
            traceback.print_exc()
            code = 1
    return code, out.getvalue(), err.getvalue()


def serve(lines: IO[str], answers: IO[str]) -> None:
    """Answers each line until there are no more."""
    for line in lines:
        asked = json.loads(line)
        code, out, err = answer([str(word) for word in asked["arguments"]])
        found = {"id": asked["id"], "code": code, "out": out, "err": err}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _prepare() -> int:
    for module in _HEAVY:
        with contextlib.suppress(ImportError):
            import_module(module)
    return 0


def main() -> None:
    """Serves on the standard streams, which are then closed to whatever libraries print."""
    here = str(Path(__file__).resolve().parent)
    # Started as a file, or its neighbours could be taken for modules of others.
    sys.path[:] = [path for path in sys.path if str(Path(path or ".").resolve()) != here]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    # A library that asks a question is answered with nothing, and not with the next command.
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    os.dup2(sys.stdin.fileno(), 0)
    serve(lines, answers)


if __name__ == "__main__":
    main()
