"""A sweep: folder, Optuna journal and trial runs."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_peft import engine
from lightning_peft.errors import (
    ConfigError,
    DivergenceError,
    TargetModulesError,
    UnsupportedError,
    first_line,
)
from lightning_peft.plugin.lightning_cli import run_subcommand
from lightning_peft.plugin.plan_callback import is_out_of_memory
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.machine import reset_peak_memory
from lightning_peft.sweeps.record import Report, recorded
from lightning_peft.sweeps.settings import SweepSettings, grid_of, import_optuna
from lightning_peft.sweeps.trial import TrialSession
from lightning_peft.tasks.validation_budget import NAME as VALIDATION

_JOURNAL = "journal.log"
_CONFIG = "--config="
_STATES = {"COMPLETE": "finished", "FAIL": "failed", "PRUNED": "pruned", "RUNNING": "running"}
# Values that do not fit the recipe; where no trial was trained yet, the recipe itself.
_REFUSALS = (ConfigError, TargetModulesError, UnsupportedError)


class Sweep:
    """A sweep on disk; :meth:`run` goes on with it where it is.

    Args:
        folder: The folder, below the root of its runs.

    Raises:
        ConfigError: If it is the folder of no sweep, or Optuna is not installed.
    """

    def __init__(self, folder: Path) -> None:
        optuna = import_optuna()
        self.folder = folder
        try:
            content = json.loads(RunFolder(folder).sweep.read_text(encoding="utf-8"))
            content["words"] = [
                f"{_CONFIG}{folder / word.removeprefix(_CONFIG)}"
                if word.startswith(_CONFIG)
                else word
                for word in content["words"]
            ]
            self.settings = SweepSettings(**content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{str(folder)!r} is not the folder of a sweep: sweep.json cannot be read "
                f"({first_line(error)}). Name the folder that the sweep printed when it began."
            ) from error
        self._report: Report
        self._distributions = {
            key: values.distribution() for key, values in self.settings.values.items()
        }
        journal = import_module("optuna.storages.journal")
        backend = journal.JournalFileBackend(str(folder / _JOURNAL))
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="sweep",
            direction={"min": "minimize", "max": "maximize"}[self.settings.mode],
            pruner=_pruner(self.settings.pruner),
            load_if_exists=True,
        )

    @classmethod
    def create(cls, root: Path, settings: SweepSettings, folder: Path | None = None) -> Sweep:
        """Makes the folder of a new sweep below ``root``, with copies of its configs."""
        if folder is not None:
            _refuse_used(RunFolder(folder))
        made = RunFolder.at(folder) if folder else RunFolder.create(root, f"sweep {settings.name}")
        made.checkpoints.rmdir()
        words = []
        for word in settings.words:
            if word.startswith(_CONFIG):
                file = Path(shutil.copy(word.removeprefix(_CONFIG), made.path))
                word = f"{_CONFIG}{file.name}"
            words.append(word)
        made.write(made.sweep, {**asdict(settings), "words": words})
        return cls(made.path)

    def run(self, show: Callable[[str], None]) -> bool:
        """Trains the trials that are left, one after the other.

        Args:
            show: Called with a line before and after each trial.

        Returns:
            Whether all are done; ``False`` after an interrupt, of which a checkpoint was saved.

        Raises:
            ConfigError: If another process is at work in the folder, or it was begun elsewhere.
            LightningPeftError: If the first trial of all fails, most likely because of the recipe;
                or a disk is full.
            Exception: Whatever else values cannot be to blame for, such as a broken device.
        """
        begun = Path(self.settings.directory)
        # One that is gone was moved, with its files.
        if begun.is_dir() and not begun.samefile(Path.cwd()):
            raise ConfigError(
                f"The sweep was begun in {str(begun)!r}, and its recipe may name files from there: "
                f"from {str(Path.cwd())!r} they would not be found. Go there first: cd {begun}"
            )
        folder = RunFolder(self.folder)
        with (
            folder.claimed(),
            engine.quantized_bases_kept(),
            recorded(folder, self.settings.trials) as self._report,
        ):
            while len(done := self._done()) < self.settings.trials:
                if not self._trial(done, show):
                    self._report(self.table(running=True), len(done), "stopped and saved")
                    return False
            self._report(self.table(), len(done), "finished")
        return True

    def _ask(self, done: Sequence[Any]) -> Any:
        """Returns the trial that an earlier process left behind half done, else the next one."""
        optuna = import_optuna()
        state = optuna.trial.TrialState
        for one in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            if "run" in one.user_attrs:
                return optuna.trial.Trial(self._study, one._trial_id)
            # It had not begun.
            self._study.tell(one.number, state=state.FAIL)
        waiting = self._study.get_trials(deepcopy=False, states=(state.WAITING,))
        if self.settings.sampler == "grid" and not waiting:
            tried = [one.params for one in done]
            left = (one for one in grid_of(self.settings.values) if one not in tried)
            self._study.enqueue_trial(next(left))
        # Of each trial its own, so that a sweep that was interrupted tries the same values. Mixed,
        # since the second trial of one seed would be the first of the next.
        (seed,) = np.random.SeedSequence([self.settings.seed, len(done)]).generate_state(1)
        self._study.sampler = _sampler(self.settings.sampler, int(seed))
        return self._study.ask(self._distributions)

    def _done(self) -> list[Any]:
        """Returns Optuna's trials that came to an end of their own."""
        state = import_optuna().trial.TrialState
        ended = self._study.get_trials(
            deepcopy=False, states=(state.COMPLETE, state.PRUNED, state.FAIL)
        )
        return [one for one in ended if one.state != state.FAIL or "error" in one.user_attrs]

    def _trial(self, done: list[Any], show: Callable[[str], None]) -> bool:
        """Trains one trial after those that are done; returns whether it came to its end."""
        state = import_optuna().trial.TrialState
        trial = self._ask(done)
        values = ", ".join(f"{key}={value}" for key, value in self._short(trial.params).items())
        place = f"trial {len(done) + 1} of {self.settings.trials} ({values})"
        same = next((one for one in done if one.params == trial.params), None)
        if same is not None:
            show(f"{place}: the same values as before, in {same.user_attrs['run']}")
            for name, text in same.user_attrs.items():
                trial.set_user_attr(name, text)
            self._study.tell(
                trial, same.value if same.state == state.COMPLETE else None, same.state
            )
            return True
        show(place)
        folder = self._folder(trial, values)
        self._report(self.table(running=True), len(done), "trial")
        try:
            session, value = self._train(trial, folder, done)
        except Exception as error:
            of_values = isinstance(error, DivergenceError) or is_out_of_memory(error)
            if not of_values and not (done and isinstance(error, _REFUSALS)):
                # Left as it is: it is repeated once the recipe, the disk or the device is right.
                raise
            problem = f"{type(error).__name__}: {first_line(error)}"
            trial.set_user_attr("error", problem)
            self._study.tell(trial, state=state.FAIL)
            show(f"{place} failed: {problem}")
            return True
        finally:
            _free_memory()
        if session.saved is not None:
            return False
        pruned = session.progress.pruned
        self._study.tell(trial, None if pruned else value, state.PRUNED if pruned else None)
        show(f"{place}: {self.settings.metric} {value:.4g}{', pruned' if pruned else ''}")
        return True

    def _folder(self, trial: Any, values: str) -> RunFolder:
        """Returns the folder of a trial's run, next to that of the sweep."""
        known = trial.user_attrs.get("run")
        if known is not None:
            return RunFolder.at(self.folder.parent / known)
        folder = RunFolder.create(self.folder.parent, f"{self.settings.name} {values}")
        trial.set_user_attr("run", folder.path.name)
        return folder

    def _train(self, trial: Any, folder: RunFolder, done: list[Any]) -> tuple[TrialSession, float]:
        """Trains a trial in its folder; one that was begun goes on from its newest checkpoint.

        Raises:
            ConfigError: If the run has no such metric, or one that is not a number.
        """
        settings = self.settings
        words = [
            *settings.words,
            *(f"--{key}={value}" for key, value in trial.params.items()),
            f"--run_dir={folder.path}",
            "--ckpt_path=last",
        ]
        decided: dict[str, Any] = {}
        for one in done:
            known = RunFolder(self.folder.parent / one.user_attrs["run"]).decided()
            decided = {VALIDATION: known[VALIDATION]} if VALIDATION in known else decided
        session = TrialSession(settings.name, decided, trial, settings.metric)
        reset_peak_memory()
        with session:
            run_subcommand("fit", words, session)
        value = session.value()
        if session.saved is None and (value is None or not math.isfinite(value)):
            names = ", ".join((session.result or {"after": {}})["after"])
            raise ConfigError(
                f"The run in {str(folder.path)!r} has {settings.metric}={value} at its end, by "
                f"which trials are judged. It has: {names or 'no metrics'}."
            )
        return session, math.nan if value is None else value

    def _short(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns values by the last part of their keys, where that says enough."""
        names = [key.rpartition(".")[2] for key in values]
        return {
            name if names.count(name) == 1 else key: value
            for (key, value), name in zip(values.items(), names, strict=True)
        }

    def table(self, running: bool = False) -> dict[str, Any]:
        """Returns the sweep as JSON: how trials are judged, the best one, and all of them."""
        settings = self.settings
        return {
            "sweep": str(self.folder),
            "metric": settings.metric,
            "mode": settings.mode,
            "best": self.best(),
            "trials": self.rows(running),
        }

    def rows(self, running: bool = False) -> list[dict[str, Any]]:
        """Returns a row for each trial that came to an end, in order; with the one that runs."""
        trials = self._done()
        if running:
            state = import_optuna().trial.TrialState.RUNNING
            begun = self._study.get_trials(deepcopy=False, states=(state,))
            trials += [one for one in begun if "run" in one.user_attrs]
        by_run: dict[str, Any] = {}
        for one in trials:
            by_run.setdefault(one.user_attrs["run"], one)
        return [self._row(number, one) for number, one in enumerate(by_run.values(), 1)]

    def _row(self, number: int, trial: Any) -> dict[str, Any]:
        run = RunFolder(self.folder.parent / trial.user_attrs["run"])
        result = json.loads(run.result.read_text("utf-8")) if run.result.is_file() else {}
        values = {key: _number(value) for key, value in trial.params.items()}
        ended = trial.value is not None
        return {
            "trial": number,
            "state": _STATES[trial.state.name],
            "values": self._short(values),
            self.settings.metric: trial.value if ended else None,
            "steps": result.get("steps"),
            "seconds": result.get("seconds"),
            "peak_memory": result.get("peak_memory"),
            "run": str(run.path),
            "error": trial.user_attrs.get("error"),
        }

    def best(self) -> dict[str, Any] | None:
        """Returns the row of the best trial that was finished."""
        metric = self.settings.metric
        finished = [row for row in self.rows() if row["state"] == "finished"]
        choose = min if self.settings.mode == "min" else max
        return choose(finished, key=lambda row: row[metric], default=None)


def _refuse_used(folder: RunFolder) -> None:
    name = str(folder.path)
    if folder.sweep.exists():
        raise ConfigError(
            f"{name!r} is the folder of a sweep. Name another one, or go on with that sweep by "
            "--resume."
        )
    if folder.status_file.exists() or any(folder.checkpoints.glob("*")):
        raise ConfigError(
            f"{name!r} is the folder of a run. Name another one for the sweep with --folder."
        )


def _number(text: Any) -> Any:
    """Returns a value that was written as a text as the number that it is."""
    for kind in (int, float):
        try:
            return kind(text) if isinstance(text, str) else text
        except ValueError:
            continue
    return text


def _sampler(name: str, seed: int) -> Any:
    samplers = import_optuna().samplers
    # A grid is a queue of trials, whose values are given.
    return samplers.TPESampler(seed=seed) if name == "tpe" else samplers.RandomSampler(seed)


def _pruner(name: str) -> Any:
    pruners = import_optuna().pruners
    known = {"median": pruners.MedianPruner, "hyperband": pruners.HyperbandPruner}
    return known.get(name, pruners.NopPruner)()


def _free_memory() -> None:
    """Lets go of a run's module before the next one is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
