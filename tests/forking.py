"""Script: imports what takes seconds, then becomes another program for each line of its input.

That is ``lightning-peft``, or a Python text. Each line is answered by the number of the process
that was forked for it, and by its exit code.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from importlib import import_module
from typing import Any

# Packages of others, but for datasets, which starts a thread. Lightning and lightning_peft are
# imported by each command, as by a user's.
IMPORTED = ("torch", "transformers", "bitsandbytes", "peft", "torchmetrics")


def main() -> None:
    # pyarrow 20, which pandas imports, starts a thread of its memory allocator.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    gc.disable()
    for name in IMPORTED:
        import_module(name)
    assert not {"lightning", "pytorch_lightning", "lightning_peft"} & sys.modules.keys()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in each fork"
    gc.freeze()
    gc.enable()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.close()
            become(json.loads(line))
            return
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def become(job: dict[str, Any]) -> None:
    """Goes on as a program with an environment, streams and a process group of its own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    for number, path in enumerate(job["streams"]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.path[0], sys.argv = job["folder"], ["lightning-peft", *job["words"]]
    if job["code"]:
        exec(compile(job["code"], "code", "exec"), {"__name__": "__main__"})
        return
    runpy.run_module("lightning_peft.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
