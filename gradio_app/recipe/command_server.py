"""Worker process: imports the library once and runs commands one after the other.

It reads a JSON line for each command, ``{"id": 1, "arguments": ["plan", ...]}``, and answers with
one: ``{"id": 1, "code": 0, "out": "...", "err": "..."}``. Lines such as ``{"id": 1, "rows": 1200}``
come before it while rows are read. The command ``import`` only imports what the others take seconds
for. An interrupt ends the command and not the process, which ends with its input.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import IO, Any

IMPORT = "import"
# What shells give for a command that was interrupted.
INTERRUPTED = 130
_HEAVY = (
    "lightning_peft.cli.preview",
    "lightning_peft.data.preview",
    "lightning_peft.plan.method_comparison",
    "lightning_peft.plugin.lightning_cli",
    "lightning_peft.tasks",
    "lightning.pytorch.cli",
)


def answer(
    arguments: list[str], on_rows: Callable[[int], None] | None = None
) -> tuple[int, str, str]:
    """Runs a command; returns its exit code and what it wrote to both outputs."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    _Interrupts.taken = True
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if arguments == [IMPORT]:
                return _prepare(), "", ""
            report_rows_to = import_module("lightning_peft.data.progress").report_rows_to
            with report_rows_to(on_rows):
                code = int(import_module("lightning_peft.cli").main(arguments))
        except SystemExit as stop:
            # argparse exits; this process continues.
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except KeyboardInterrupt as stop:
            if _in_import(stop.__traceback__):
                # Half a module would be left behind.
                os._exit(INTERRUPTED)
            code = INTERRUPTED
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            _Interrupts.taken = False
    return code, out.getvalue(), err.getvalue()


class _Interrupts:
    """Whether an interrupt ends something: between two commands there is nothing to end."""

    taken = False

    @classmethod
    def handle(cls, *_: object) -> None:
        if cls.taken:
            cls.taken = False
            raise KeyboardInterrupt


def _in_import(trace: TracebackType | None) -> bool:
    """Whether an exception was raised while a module was being imported."""
    names = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
    return any(name.startswith("<frozen importlib") for name in names)


def serve(requests: Iterable[bytes], replies: IO[bytes]) -> None:
    """Answers each line until there are no more."""

    def reply(**row: Any) -> None:
        replies.write(json.dumps(row).encode() + b"\n")
        replies.flush()

    for line in requests:
        request = json.loads(line)
        number = request["id"]
        arguments = [str(word) for word in request["arguments"]]

        def on_rows(rows: int, number: int = number) -> None:
            reply(id=number, rows=rows)

        code, out, err = answer(arguments, on_rows)
        reply(id=number, code=code, out=out, err=err)


def _prepare() -> int:
    # All of it lives to the end, and a sixth of the time would go into looking for garbage.
    gc.disable()
    try:
        for module in _HEAVY:
            with contextlib.suppress(ImportError):
                import_module(module)
        gc.freeze()
    finally:
        gc.enable()
    return 0


def main() -> None:
    """Serves on the standard streams, which are then closed to whatever libraries print."""
    here = str(Path(__file__).resolve().parent)
    # Started as a file, or its neighbours could be taken for modules of others.
    sys.path[:] = [path for path in sys.path if str(Path(path or ".").resolve()) != here]
    # Not above: Python 3.10 would look into this folder first.
    from lightning_peft.processes import claim_standard_streams  # noqa: PLC0415

    requests, replies = claim_standard_streams()
    signal.signal(signal.SIGINT, _Interrupts.handle)
    serve(requests, replies)


if __name__ == "__main__":
    main()
