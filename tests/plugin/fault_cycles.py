"""Script: ends runs at random moments, resumes them, and compares with a run that was left alone.

``make test-faults ARGS="--one 200 --two 50 --seed 0"`` does so many cycles on one and on two
processes. Each moment is the n-th of the events below, so that a cycle can be repeated
(``--only 17``). Most processes are killed; one in five gets SIGTERM, as before preemption. In every
second cycle checkpoints are written in the background.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from modules import differing, lightning, loader, strategy, task, trainer

from lightning_peft.plugin.interruption import SaveOnInterrupt
from lightning_peft.plugin.namespace import bind_to_lightning
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.recorder import RunRecorder
from lightning_peft.tasks.callbacks import BestCheckpoint

ROOT = "pytorch_lightning"
IMPORTED = (
    *("bitsandbytes", "transformers.models.llama.modeling_llama", "torch.nn.parallel"),
    *("pytorch_lightning.trainer", "lightning_peft.engine", "lightning_peft.plugin.strategies"),
)
# Seconds for one training, which takes less than one on a machine that is not busy.
LONGEST = 300
HOOKS = (
    *("setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_save_checkpoint"),
    *("on_validation_batch_start", "on_validation_end", "on_train_end", "teardown"),
)


class Events:
    """Counts what happens in a process, and sends a signal to it at one of these events."""

    def __init__(self, at: int = 0, number: int = 0) -> None:
        self.at, self.number, self.count = at, number, 0

    def happens(self, *given: Any) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), self.number)

    def watch_files(self) -> None:
        """Makes events of each write, half of which is done, and of each rename."""
        save, rename = torch.save, os.replace

        def save_half(content: Any, file: Any, *given: Any, **named: Any) -> None:
            if self.count + 1 == self.at and self.number == signal.SIGKILL:
                save(content, file, *given, **named)
                file.truncate(file.tell() // 2)
            self.happens()
            save(content, file, *given, **named)

        def replace(source: Any, target: Any) -> None:
            self.happens()
            rename(source, target)

        torch.save, os.replace = save_half, replace
        # Flushing guards against a power cut, which is not tried here.
        os.fsync = self.happens

    def callback(self) -> Any:
        def hook(own: Any, *given: Any, **named: Any) -> None:
            self.happens()

        return type("Watch", (lightning(ROOT).Callback,), dict.fromkeys(HOOKS, hook))()


def train(folder: Path, processes: int, events: Events, in_background: bool) -> None:
    """Trains two epochs of six steps, from the newest checkpoint of the folder if there is one."""
    checkpoint = RunFolder(folder).resumable_checkpoint()
    torch.manual_seed(5 if checkpoint is None else 1000)
    module = task(ROOT, kind="llama")
    callbacks = [
        bind_to_lightning(RunRecorder, ROOT)(folder),
        bind_to_lightning(SaveOnInterrupt, ROOT)(),
        bind_to_lightning(BestCheckpoint, ROOT)(save_every=3),
        events.callback(),
    ]
    run = trainer(
        folder,
        strategy("qlora", ROOT, lora_dropout=0.3, async_save=in_background),
        ROOT,
        devices=processes,
        max_epochs=2,
        callbacks=callbacks,
    )
    rows = loader("llama").dataset
    data = torch.utils.data.DataLoader(rows, batch_size=4 // processes, shuffle=True)
    events.watch_files()
    run.fit(module, data, loader("llama"), ckpt_path=checkpoint)


def start(
    folder: Path, rank: int, processes: int, port: int, events: Events, in_background: bool
) -> int:
    """Forks a process that trains; what it prints goes to a file of the folder."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        printed = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        if processes > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        torch.set_num_threads(1)
        train(folder, processes, events, in_background)
        (folder / f"rank{rank}.events").write_text(str(events.count))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def attempt(
    folder: Path,
    processes: int,
    in_background: bool,
    victim: int = 0,
    at: int = 0,
    number: int = 0,
) -> bool:
    """Trains until all processes have ended, by themselves or after one; whether all went well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {
        start(
            *(folder, rank, processes, port),
            Events(at if rank == victim else 0, number),
            in_background,
        )
        for rank in range(processes)
    }
    well, end, forced = True, time.monotonic() + LONGEST, False
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                running.discard(child)
                if status and well:
                    # As torchrun does with the others.
                    well, end = False, min(end, time.monotonic() + 20)
                    for other in running:
                        os.kill(other, signal.SIGTERM)
        if running and time.monotonic() > end:
            well, end, forced = False, time.monotonic() + LONGEST, True
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return well and not forced


def result(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    states = content["optimizer_states"][0]["state"]
    moments = {f"{n} {key}": value for n, state in states.items() for key, value in state.items()}
    return {**content["state_dict"], **moments, "step": torch.tensor(content["global_step"])}


def check(condition: bool, cycle: str, folder: Path) -> None:
    if not condition:
        logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank*.log")))
        raise SystemExit(f"{cycle} failed; its folder is {folder}.\n{logs}")


def run_cycles(processes: int, cycles: list[int], seed: int, root: Path) -> dict[str, int]:
    """Does the cycles, and returns how often a process was killed, and preempted."""
    whole = root / f"whole{processes}"
    whole.mkdir()
    check(attempt(whole, processes, False), "the uninterrupted run", whole)
    expected = result(whole)
    lengths = [int((whole / f"rank{rank}.events").read_text()) for rank in range(processes)]
    sent = {"killed": 0, "preempted": 0}
    for cycle in cycles:
        draw = random.Random(f"{seed} {processes} {cycle}")
        folder = root / f"{processes}-{cycle}"
        folder.mkdir()
        in_background = cycle % 2 == 1
        for _ in range(draw.choice((1, 1, 2, 3))):
            victim = draw.randrange(processes)
            number = draw.choice((signal.SIGKILL,) * 4 + (signal.SIGTERM,))
            at = draw.randint(1, lengths[victim])
            attempt(folder, processes, in_background, victim, at, number)
            sent["killed" if number == signal.SIGKILL else "preempted"] += 1
        name = f"cycle {cycle} with seed {seed} on {processes}"
        check(attempt(folder, processes, in_background), name, folder)
        found = result(folder)
        check(found.keys() == expected.keys(), name, folder)
        check(not differing(found, expected), name, folder)
        check(not [*folder.rglob(".incomplete-*"), *folder.rglob(".replaced-*")], name, folder)
        checkpoints = folder / "checkpoints"
        saved = {path.stem for path in checkpoints.glob("*.ckpt")}
        check({path.name for path in (checkpoints / "adapters").iterdir()} == saved, name, folder)
        shutil.rmtree(folder)
    return sent


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, default=200, help="cycles on one process")
    parser.add_argument("--two", type=int, default=50, help="cycles on two processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this cycle alone")
    given = parser.parse_args(words)
    for name in IMPORTED:
        # Once, for all the processes that are forked.
        import_module(name)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    for processes, count in ((1, given.one), (2, given.two)):
        cycles = list(range(count)) if given.only is None else [given.only]
        if count:
            sent = run_cycles(processes, cycles, given.seed, root)
            done = {"processes": processes, "cycles": len(cycles), "seed": given.seed, **sent}
            print(json.dumps({**done, "different": 0}), flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
