"""One run of the command line, from config to result, in its own folder."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jsonargparse import Namespace

from lightning_peft.engine.files.adapter_files import write_file
from lightning_peft.errors import ConfigError, LightningPeftError, StorageError
from lightning_peft.file_errors import storage_problem
from lightning_peft.plugin.interruption import SaveOnInterrupt
from lightning_peft.plugin.launch import (
    check_restarts,
    ended_process,
    is_first_process,
    is_restarted,
    torchrun_layout,
)
from lightning_peft.plugin.namespace import bind_to_lightning
from lightning_peft.plugin.plan_callback import MemoryPlanCallback
from lightning_peft.runs.folder import DEFAULT_ROOT, RunFolder
from lightning_peft.runs.log import logged_to
from lightning_peft.runs.record import best_checkpoint, numbers
from lightning_peft.runs.recorder import RunRecorder
from lightning_peft.runs.status import StartTimes

log = logging.getLogger(__name__)

# Processes that the first one starts, by DDP, inherit it and leave the record alone.
_VARIABLE = "LIGHTNING_PEFT_RUN"


class RunSession:
    """Gives a run of LightningCLI its folder, and closes the record however the run ends.

    ``name`` is what the run is called, such as its recipe; ``decided`` is what another run decided
    for arguments that are ``"auto"``. ``verbose`` says what took how long until the first step.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        decided: dict[str, Any] | None = None,
        verbose: bool = False,
    ) -> None:
        self.kind, self.name, self.decided, self.verbose = kind, name, decided, verbose
        self._times = StartTimes()
        # None before it is made, and on other processes than the first.
        self.folder: RunFolder | None = None
        self.result: dict[str, Any] | None = None
        # The checkpoint that was saved where the run was interrupted.
        self.saved: Path | None = None
        self._recorder: Any = None
        self._open = ExitStack()

    def __enter__(self) -> RunSession:
        """Returns the session; the folder is made when the config has been read."""
        return self

    def begin(self, config: Namespace, recipe: str, root: str) -> list[Any]:
        """Makes the folder, lets everything of the run go there, and returns callbacks for that.

        Places that the user left open in ``config`` are filled in.
        """
        self._times.ended("Python, imports and config")
        self._interruption = bind_to_lightning(SaveOnInterrupt, root)()
        if config["trainer"].get("val_check_interval") is not None:
            # 1.0 as well, which for the Trainer is its default.
            _leave_out_budget(config["trainer"])
        layout = torchrun_layout()
        if layout is not None:
            # The processes that torchrun started, however many there are now.
            config["trainer"]["devices"], config["trainer"]["num_nodes"] = layout
        first = is_first_process() and _VARIABLE not in os.environ
        _choose_checkpoint(config, self.kind, warn=first)
        if first:
            self._begin_record(config, recipe, root)
        else:
            # The same in all processes: Lightning looks there for what it saved on SLURM.
            place = os.environ.get(_VARIABLE) or config.get("run_dir")
            if place:
                config["trainer"]["default_root_dir"] = place
        callbacks = [self._recorder] if self._recorder is not None else []
        if self.kind == "fit":
            callbacks.append(bind_to_lightning(MemoryPlanCallback, root)())
        return [*callbacks, self._interruption]

    def _begin_record(self, config: Namespace, recipe: str, root: str) -> None:
        run_dir = config.get("run_dir")
        name = self.name if self.kind == "fit" else f"{self.kind}-{self.name}"
        self.folder = (
            RunFolder.at(Path(run_dir)) if run_dir else RunFolder.create(Path(DEFAULT_ROOT), name)
        )
        os.environ[_VARIABLE] = str(self.folder.path)
        self._open.callback(os.environ.pop, _VARIABLE, None)
        seed = config.get("seed_everything")
        recorder_class = bind_to_lightning(RunRecorder, root)
        self._recorder = recorder_class(
            self.folder, recipe, self.kind, seed if isinstance(seed, int) else None, self.decided
        )
        if self.verbose:
            self._recorder.start_times = self._times
        self._recorder.open()
        self._open.enter_context(logged_to(self.folder.log))
        # The page reads it meanwhile: files that it names are kept.
        write_file(self.folder.recipe, recipe.encode())
        for stale in (self.folder.control, self.folder.error):
            stale.unlink(missing_ok=True)
        trainer = config["trainer"]
        trainer["default_root_dir"] = str(self.folder.path)
        trainer["logger"] = _with_csv(trainer.get("logger"), self.folder.path, root)

    def end(self, trainer: Any, module: Any, datamodule: Any) -> None:
        """Writes the result of a run that came to its end, or where it was interrupted."""
        self.saved = self._interruption.saved
        if self._recorder is None:
            if self.kind == "fit" and self.saved is None:
                self._after_fit(trainer, module, datamodule)
            return
        if self.saved is not None:
            self._recorder.stopped(self.saved)
            return
        if self.kind == "fit":
            if not self._recorder.pace.rows:
                log.warning(
                    "Nothing was trained: the checkpoint is at the end of the run already. Raise "
                    "max_epochs or max_steps to go on."
                )
            after = self._after_fit(trainer, module, datamodule)
        else:
            after = numbers(trainer.callback_metrics)
        self.result = self._recorder.finish(trainer, module, after)

    def _after_fit(self, trainer: Any, module: Any, datamodule: Any) -> dict[str, float]:
        """Returns the metrics of the checkpoint that the run recommends."""
        best = best_checkpoint(trainer)
        known: dict[int, dict[str, float]] = getattr(self._recorder, "validations", {})
        # The same on all processes: evaluating takes all of them.
        step = _step_of(best) if best is not None else trainer.global_step
        measured = trainer.strategy.broadcast(known.get(step))
        if measured is not None:
            return dict(measured)
        if not trainer.num_val_batches or not sum(trainer.num_val_batches):
            return {}
        if self._recorder is not None:
            self._recorder.update_status(phase="evaluating the best checkpoint")
        if hasattr(datamodule, "validates_as_in_fit"):
            # The numbers before training are those of these rows too.
            datamodule.validates_as_in_fit = True
        rows = trainer.validate(module, datamodule=datamodule, ckpt_path=best, verbose=False)
        return numbers(rows[0]) if rows else {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the record; what ended the run is written down."""
        explained = self._explained(error)
        if self._recorder is not None:
            if explained is not None:
                # The record has both.
                explained.__cause__ = error
            if error is not None:
                self._recorder.fail(explained or error)
            self._recorder.close()
        self._open.close()
        if explained is not None:
            raise explained from error

    def _explained(self, error: BaseException | None) -> LightningPeftError | None:
        """Returns an error that says what happened to the folder or to another process."""
        if error is None or isinstance(error, LightningPeftError):
            return None
        place = self.folder.path if self.folder is not None else None
        again = "Then run the same command again."
        if self.kind == "fit":
            resume = f"`lightning-peft fit --resume {place or 'RUN'}`"
            again = f"Then {resume} continues from the newest checkpoint."
        if isinstance(error, OSError) and place is not None:
            problem = storage_problem(place, error)
            if problem is not None:
                return StorageError(f"The run in {str(place)!r} ended: {problem}. {again}")
        process = ended_process(error)
        return None if process is None else LightningPeftError(f"The run ended: {process}. {again}")


def _choose_checkpoint(config: Namespace, kind: str, warn: bool) -> None:
    """Continues a run that torchrun started again, or where ``ckpt_path`` is ``"last"``."""
    run_dir, given = config.get("run_dir"), config.get("ckpt_path")
    if run_dir and RunFolder(Path(run_dir)).sweep.is_file():
        raise ConfigError(
            f"--run_dir {run_dir} is the folder of a sweep, whose record this run would overwrite. "
            f"Name another one; `lightning-peft sweep --resume {run_dir}` continues the sweep."
        )
    if kind == "fit":
        check_restarts(has_folder=bool(run_dir))
    # What is evaluated is what was asked for, also after a restart.
    if given != "last" and not (kind == "fit" and is_restarted()):
        return
    newest = RunFolder(Path(run_dir)).resumable_checkpoint(warn) if run_dir else None
    if newest is None and kind != "fit":
        where = f"{run_dir!r} has none" if run_dir else "there is no --run_dir"
        raise ConfigError(
            f"{kind} --ckpt_path last takes the newest checkpoint of the run folder, and {where}. "
            "Without one the untrained model would be evaluated. Name the folder of a run that "
            "saved a checkpoint, or the file itself."
        )
    if run_dir and (newest is not None or given == "last"):
        config["ckpt_path"] = None if newest is None else str(newest)


def _step_of(checkpoint: str) -> int:
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


def _leave_out_budget(trainer: Any) -> None:
    callbacks = trainer.get("callbacks")
    if isinstance(callbacks, list):
        budget = ".ValidationBudget"
        kept = [one for one in callbacks if not str(one.get("class_path")).endswith(budget)]
        trainer["callbacks"] = kept


def _with_csv(logger: Any, folder: Path, root: str) -> Any:
    """Returns the loggers of the user with one that writes CSV; ``False`` stays none."""
    if logger is False:
        return False
    csv = Namespace(
        class_path=f"{root}.loggers.CSVLogger",
        init_args=Namespace(save_dir=str(folder), name="csv"),
    )
    if logger in (None, True):
        return csv
    others = logger if isinstance(logger, list) else [logger]
    return [*others, csv]
