"""A command line that trains nothing, but writes the folder of a run as the real one does.

``fit --config=FILE --run_dir=FOLDER`` and ``fit --resume=FOLDER``, with the files, signals and exit
codes of ``lightning-peft fit`` (docs/runs.md); ``sweep --resume=FOLDER`` writes a grid's trials, of
which the first time two are done, and then the others. The recipe chooses what happens, below
``fake``:

    fake: {steps: 20, seconds: 0.05, validate_every: 10, alert: overfitting, fail_at: 5,
           error: "...", message: "...", die_at: 7, refuse: "...", start_seconds: 0, log: "..."}
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.runs.alerts import Alert
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.log import logged_to
from lightning_peft.runs.status import StatusFile
from lightning_peft.sweeps.record import recorded

if __name__ == "__main__":
    assert "torch" not in sys.modules, "each run would take seconds until it starts"

QUESTION = "What colour is the sky?"


class FakeRun:
    def __init__(self, folder: RunFolder, recipe: dict[str, Any], first: int) -> None:
        fake = recipe.get("fake") or {}
        self.folder, self.first = folder, first
        self.steps = int(fake.get("steps", 20))
        self.seconds = float(fake.get("seconds", 0.05))
        self.validate_every = int(fake.get("validate_every", 10))
        self.fake = fake
        self.stop = False
        self.status = StatusFile(folder.status_file, "fit", heartbeat=1.0)

    def interrupted(self, number: int, frame: Any) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        print("Stopping when this step is done, and saving.", file=sys.stderr, flush=True)

    def fit(self) -> int:
        self.status.update(phase="preparing model and data")
        print("trainable 315,392 of 4,577,536 parameters (6.89 %)", flush=True)
        if "log" in self.fake:
            print(self.fake["log"], flush=True)
        self.folder.write(self.folder.provenance, provenance())
        if not self.first:
            self.validated(0)
        signal.signal(signal.SIGTERM, self.interrupted)
        signal.signal(signal.SIGINT, self.interrupted)
        self.event("started", f"Training starts{f' at step {self.first}' if self.first else ''}.")
        self.status.update(
            state="running", phase="training", step=self.first, total_steps=self.steps
        )
        for step in range(self.first + 1, self.steps + 1):
            time.sleep(self.seconds)
            self.one(step)
            self.follow_control(step)
            if self.stop:
                return self.stopped(step)
        self.save("last", self.steps)
        self.folder.write(self.folder.result, result(self.steps, loss_at(self.steps)))
        self.status.update(state="finished", phase="finished", eta_seconds=None)
        return 0

    def one(self, step: int) -> None:
        if step == self.fake.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.fake.get("fail_at"):
            kind = type(str(self.fake.get("error", "RuntimeError")), (Exception,), {})
            raise kind(self.fake.get("message", "it failed"))
        row = {
            "train_loss": float("nan") if step == self.fake.get("nan_at") else loss_at(step),
            "learning_rate": 2e-4 * (1 - step / (self.steps + 1)),
            "grad_norm": 1.0,
            "steps_per_second": 1 / self.seconds,
            "tokens_per_second": 2_100.0,
            "peak_process_bytes": 991_117_312,
        }
        self.log(step, row)
        load = {"seconds": 30.0 * step, "cpu_percent": 80.0, "process_bytes": 990_000_000}
        self.folder.append(self.folder.load, {**load, "tokens_per_second": 2_100.0})
        print(f"step {step}", flush=True)
        left = (self.steps - step) * self.seconds
        self.status.update(step=step, steps_per_second=1 / self.seconds, eta_seconds=left)
        if step % self.validate_every == 0:
            self.validated(step)
            self.save("best", step)

    def validated(self, step: int) -> None:
        self.status.update(phase="validating" if step else "evaluating before training")
        rising = self.fake.get("alert") == "overfitting" and step > self.validate_every
        self.log(step, {"val_loss": loss_at(step) + (0.01 * step if rising else 0.05)})
        words = "blue, as all know" if step > self.steps / 2 else f"gren bleu {step}"
        row = {
            "step": step,
            "sample": 0,
            "prompt": self.fake.get("prompt", QUESTION),
            "expected": "Blue.",
            "generated": self.fake.get("generated", words),
        }
        self.folder.append(self.folder.samples, row)
        if rising and step == 3 * self.validate_every:
            seen = {"of": "val_loss", "first": 0.9, "last": 1.125, "times": 2}
            alert = Alert("overfitting", "The validation loss has risen 2 times in a row.", seen)
            self.event(alert.kind, alert.text, alert=seen)
        if step:
            self.status.update(phase="training")

    def log(self, step: int, values: dict[str, Any]) -> None:
        row = {"step": step, "epoch": 0, **values, "time": time.time()}
        self.folder.append(self.folder.metrics, row)

    def event(self, kind: str, text: str, **more: Any) -> None:
        row = {"step": self.status.status.step, "kind": kind, "text": text, "time": time.time()}
        self.folder.append(self.folder.events, {**row, **more})

    def save(self, name: str, step: int) -> str:
        adapter = self.folder.checkpoints / "adapters" / name
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        self.folder.write(adapter / "provenance.json", {"global_step": step})
        (self.folder.checkpoints / f"{name}.ckpt").write_text(str(step))
        place = f"checkpoints/{name}.ckpt"
        self.status.update(checkpoint=place)
        return place

    def follow_control(self, step: int) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError):
            asked = json.loads(self.folder.control.read_text())
            self.folder.control.unlink()
            if asked.get("save_now"):
                self.save("saved", step)
            if asked.get("stop"):
                self.status.update(state="stopping", phase="stopping after this step")
                self.stop = True

    def stopped(self, step: int) -> int:
        place = self.save("interrupted", step)
        self.status.update(
            state="stopped", phase="stopped and saved", checkpoint=place, eta_seconds=None
        )
        return 130


def loss_at(step: int) -> float:
    return round(0.5 + 2.6 * math.exp(-step / 8), 4)


def provenance() -> dict[str, Any]:
    return {
        "created": "2026-01-01T00:00:00Z",
        "recipe_sha256": "0" * 64,
        "seed": 0,
        "task": "lightning_peft.tasks.causal_lm.CausalLM",
        "base": {"model": {"name_or_path": "demo/base", "fingerprint": "f" * 16}},
        "data": {"class": "lightning_peft.SupervisedData", "rows": 96},
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "hardware": {"processor": "AMD EPYC", "cores": 2, "gpus": []},
    }


def result(steps: int, loss: float) -> dict[str, Any]:
    return {
        "kind": "fit",
        "before": {"val_loss": loss_at(0) + 0.05},
        "after": {"val_loss": loss + 0.05},
        "seconds": 2.5,
        "steps": steps,
        "task": "CausalLM",
        "method": "qlora",
    }


def sweep(folder: RunFolder) -> int:
    sets = json.loads(folder.sweep.read_text())["sets"]
    grid = list(itertools.product(*(text.split(",") for text in sets.values())))
    names = [key.rpartition(".")[2] for key in sets]
    before = 2 if folder.trials.exists() else 0
    done = len(grid) if before else 2
    rows = [
        {
            "trial": number,
            "state": "finished",
            "values": dict(zip(names, map(json.loads, values), strict=True)),
            "val_loss": 1.0 / number,
            "steps": 4,
            "seconds": 2.0,
            "run": f"trial-{number}",
        }
        for number, values in enumerate(grid[:done], 1)
    ]
    with recorded(folder, len(grid)) as report:
        table = {"metric": "val_loss", "mode": "min", "best": rows[-1], "trials": rows}
        report(table, done, "trial")
        # Until it is stopped.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        while done < len(grid):
            time.sleep(0.1)
    return 0


def main(words: list[str]) -> int:
    options = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
    if words[0] == "sweep":
        return sweep(RunFolder(Path(options["resume"])))
    if "resume" in options:
        folder = RunFolder(Path(options["resume"]))
        newest = folder.newest_checkpoint()
        assert newest is not None
        first = int(newest.read_text())
    else:
        folder, first = RunFolder.at(Path(options["run_dir"])), 0
    recipe = yaml.safe_load(folder.recipe.read_text())
    fake = recipe.get("fake") or {}
    time.sleep(float(fake.get("start_seconds", 0)))
    if "refuse" in fake:
        print(f"lightning-peft: {fake['refuse']}", file=sys.stderr)
        return 2
    with logged_to(folder.log):
        folder.control.unlink(missing_ok=True)
        folder.error.unlink(missing_ok=True)
        run = FakeRun(folder, recipe, first)
        try:
            return run.fit()
        except KeyboardInterrupt:
            run.status.update(state="stopped", phase="stopped at once", eta_seconds=None)
            return 130
        except Exception as error:
            kind = type(error).__name__
            content = {"error": kind, "message": str(error), "traceback": [f"{kind}: {error}\n"]}
            folder.write(folder.error, content)
            print(f"{kind}: {error}", file=sys.stderr)
            run.status.update(state="failed", phase=f"failed: {kind}", eta_seconds=None)
            return 1
        finally:
            run.status.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
