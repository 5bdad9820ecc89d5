"""Live record of a run: status, metrics, samples, alerts and result."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_peft import engine
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.load import LoadLog
from lightning_peft.runs.machine import hardware, peak_memory, versions
from lightning_peft.runs.provenance import text_digest
from lightning_peft.runs.status import StartTimes, StatusFile
from lightning_peft.runs.throughput import Throughput


class RunRecord:
    """What a run leaves in its folder; the arguments are those of the recorder."""

    def __init__(
        self,
        folder: RunFolder | str | Path,
        recipe: str = "",
        kind: str = "fit",
        seed: int | None = None,
        decided: dict[str, Any] | None = None,
    ) -> None:
        self.decided: dict[str, Any] = dict(decided or {})
        # Where it is to be said what took how long until the first step.
        self.start_times: StartTimes | None = None
        self._facts: dict[str, Any] = {}
        self._written = ""
        self.folder = folder if isinstance(folder, RunFolder) else RunFolder.at(Path(folder))
        self.recipe, self.kind, self.seed = recipe, kind, seed
        self.before: dict[str, float] = {}
        self.validations: dict[int, dict[str, float]] = {}
        self.started = time.time()
        self.status: StatusFile | None = None
        self._claim = ExitStack()
        self.pace = Throughput()
        self._accumulated = 1
        # Whoever opens the record closes it; in Python that is the Trainer.
        self._of_trainer = False
        self._losses: list[float] = []
        self._alerted: set[str] = set()
        self._of_step: dict[str, float] = {}
        self._updated = 0.0
        self._seen_step = -1
        self._peaks: dict[str, int] = {}
        self._load: LoadLog | None = None
        # The speed that was logged last.
        self._rates: dict[str, float] = {}

    def open(self) -> None:
        """Begins the record: from here on the folder says that the run is alive."""
        if self.status is None:
            self._claim.enter_context(self.folder.claimed())
            self.status = StatusFile(self.folder.status_file, self.kind)
            if self.kind == "fit":
                self._load = LoadLog(self.folder, self._earlier_seconds, lambda: self._rates)

    def update_status(self, **changes: Any) -> None:
        """Changes fields of the status, on the process that keeps the record."""
        if self.status is not None:
            self.status.update(**changes)

    def _phase_ended(self, phase: str) -> None:
        if self.start_times is not None:
            self.start_times.ended(phase)

    def record_samples(self, samples: list[Any], step: int) -> None:
        """Writes what the model generates at ``step``; the base at 0."""
        if self.status is not None:
            for place, sample in enumerate(samples):
                row = {"step": step, "sample": place, **asdict(sample)}
                self.folder.append(self.folder.samples, row)

    def fail(self, exception: BaseException) -> None:
        """Writes down why the run ended: stopped by the user, or failed."""
        # A disk that does not take this either must not hide the reason.
        with suppress(OSError):
            self._write_end(exception)
        if self._of_trainer:
            self.close()

    def _write_end(self, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._ended("stopped", "stopped at once")
        elif self.status is not None:
            self.folder.write_error(exception)
            self._ended("failed", f"failed: {type(exception).__name__}")

    def _ended(self, state: str, phase: str, **more: Any) -> None:
        self.update_status(state=state, phase=phase, part=None, eta_seconds=None, **more)

    def stopped(self, checkpoint: Path) -> None:
        """Writes down that the run was stopped, and where it can go on."""
        place = checkpoint.resolve().relative_to(self.folder.path.resolve()).as_posix()
        self._ended("stopped", "stopped and saved", checkpoint=place)

    def finish(self, trainer: Any, module: Any, after: dict[str, float]) -> dict[str, Any]:
        """Writes the result of the run, and returns it."""
        known = {
            "run": self.folder.path.name,
            "kind": self.kind,
            "before": self.before,
            "after": after,
            "rows": self.pace.rows,
            "tokens": self.pace.tokens,
            "validation_rows": getattr(trainer.datamodule, "validated", None),
            "seconds": round(self._earlier_seconds + time.time() - self.started, 1),
            **self._validation_time(),
            "seed": self.seed,
            "recipe_sha256": text_digest(self.recipe),
        }
        record = result(trainer, module, known | {"peak_memory": self._peak()})
        self.folder.write(self.folder.result, record)
        self._ended("finished", "finished", checkpoint=self._newest())
        return record

    def _validation_time(self) -> dict[str, Any]:
        """Returns the time of validation and samples in the last session of a fit."""
        if self.kind != "fit":
            return {}
        self.pace.validation_ends(whole=False)
        seconds, whole = self.pace.validated, time.time() - self.started
        return {
            "validation_seconds": round(seconds, 1),
            "validation_share": round(seconds / max(whole, 1e-9), 3),
        }

    def close(self) -> None:
        """Ends the heartbeat."""
        if self._load is not None:
            self._load.close()
            self._load = None
        if self.status is not None:
            self.status.close()
            self.status = None
            self._claim.close()

    @property
    def _earlier_seconds(self) -> float:
        return self.status.status.earlier_seconds if self.status is not None else 0.0

    def _peak(self) -> dict[str, int]:
        """Returns the most memory in use, over all sessions of the run."""
        here = peak_memory()
        return {name: max(most, self._peaks.get(name, 0)) for name, most in here.items()}

    def _newest(self) -> str | None:
        checkpoint = self.folder.newest_checkpoint()
        return None if checkpoint is None else checkpoint.relative_to(self.folder.path).as_posix()

    def _log_metrics(self, trainer: Any, values: dict[str, Any]) -> None:
        if self.status is not None and values:
            place = {"step": trainer.global_step, "epoch": trainer.current_epoch}
            self.folder.append(self.folder.metrics, {**place, **values, "time": time.time()})

    def _event(self, trainer: Any, kind: str, text: str, **more: Any) -> None:
        if self.status is not None:
            row = {"step": trainer.global_step, "kind": kind, "text": text, "time": time.time()}
            self.folder.append(self.folder.events, {**row, **more})

    def _alert(self, trainer: Any, alert: Any) -> None:
        if alert is not None and alert.kind not in self._alerted:
            self._alerted.add(alert.kind)
            self._event(trainer, alert.kind, alert.text, alert=dict(alert.seen))


def numbers(metrics: dict[str, Any], of: str = "") -> dict[str, float]:
    """Returns the metrics that are single numbers and whose names begin with ``of``, as such."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if name.startswith(of)
        and (isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1))
    }


def result(trainer: Any, module: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a finished run, ready for JSON."""
    cls = getattr(type(module), "unbound_class", type(module))
    trained = [param for param in module.parameters() if param.requires_grad]
    return {
        **known,
        "task": cls.__name__,
        "method": method_of(module),
        "model": module.hparams.get("model"),
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "trainable_parameters": sum(param.numel() for param in trained),
        "precision": str(trainer.precision),
        "devices": trainer.world_size,
        "checkpoint": best_checkpoint(trainer),
        "versions": versions(),
        "hardware": hardware(),
    }


def best_checkpoint(trainer: Any) -> str | None:
    """Returns the checkpoint that a run recommends: the best one, else the last."""
    callback = trainer.checkpoint_callback
    if callback is None:
        return None
    return callback.best_model_path or getattr(callback, "last_model_path", "") or None


def method_of(module: Any) -> str:
    """Returns ``"qlora"``, ``"lora"`` (or PEFT's name of another method), or ``"full"``."""
    record = engine.record_of(module)
    if record is None:
        return "full"
    parts = record.parts.values()
    if any(part.quantization for part in parts):
        return "qlora"
    kinds = {info.config["peft_type"] for part in parts for info in part.adapters.values()}
    return "+".join(sorted(str(kind).lower() for kind in kinds))
