"""A sweep: its folder, which Optuna's journal is in, and the runs that it starts one by one."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_peft import engine
from lightning_peft.errors import ConfigError, DivergenceError, StorageError, first_line
from lightning_peft.plugin.launch import torchrun_layout
from lightning_peft.plugin.lightning_cli import parsed_config, run_subcommand
from lightning_peft.plugin.plan_callback import is_out_of_memory
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.machine import reset_peak_memory
from lightning_peft.sweeps.trial import TrialSession
from lightning_peft.sweeps.values import Values, check_values, grid_of, parse_sets, parse_values
from lightning_peft.tasks.validation_budget import NAME as VALIDATION

SAMPLERS = ("grid", "random", "tpe")
PRUNERS = ("none", "median", "hyperband")
_SETTINGS, _JOURNAL = "sweep.json", "journal.log"


@dataclass(frozen=True)
class SweepSettings:
    """What ``sweep.json`` holds.

    Attributes:
        name: Of the recipe.
        words: The arguments of ``fit`` that all trials share; configs are copies in the folder.
        sets: The values as they were written, by full key.
        sampler: One of ``SAMPLERS``.
        pruner: One of ``PRUNERS``.
        trials: How many there are.
        seed: Of the sampler.
        metric: What trials are judged by.
        mode: Whether the least (``"min"``) or the greatest (``"max"``) value is best.
    """

    name: str
    words: list[str]
    sets: dict[str, str]
    sampler: str
    pruner: str
    trials: int
    seed: int
    metric: str
    mode: str

    @property
    def values(self) -> dict[str, Values]:
        """The values by full key."""
        return {key: parse_values(text) for key, text in self.sets.items()}


def check_sweep(
    name: str,
    words: Sequence[str],
    sets: Sequence[str],
    sampler: str | None,
    trials: int | None,
    pruner: str = "none",
    seed: int = 0,
) -> SweepSettings:
    """Returns the settings of a new sweep, with all that can be wrong before a step checked.

    Args:
        name: What the runs are called.
        words: The arguments of ``fit``, with configs as files.
        sets: What ``--set`` was given.
        sampler: One of ``SAMPLERS``; by default a grid, with ranges or ``trials`` TPE.
        trials: How many runs; a grid has as many as combinations.
        pruner: One of ``PRUNERS``.
        seed: Of the sampler.

    Raises:
        ConfigError: If something of it does not go together, with all values that are wrong.
    """
    config = parsed_config(words)
    _optuna()
    texts = parse_sets(sets, config)
    if not texts:
        raise ConfigError("Nothing is tried: name values with --set, such as --set r=8,16,64.")
    values = {key: parse_values(text) for key, text in texts.items()}
    ranges = any(one.is_range for one in values.values())
    sampler = sampler or ("tpe" if ranges or trials else "grid")
    if sampler == "grid":
        combinations = len(grid_of(values))
        if trials not in (None, combinations):
            raise ConfigError(
                f"--trials {trials} with a grid, which has {combinations} combinations. Leave it "
                "out, or take --sampler random or tpe."
            )
        trials = combinations
    if trials is None or trials < 1:
        raise ConfigError(f"--sampler {sampler} takes --trials N: how many runs, at least 1.")
    metric, mode = _monitored(config)
    shared = [*words, *_one_process(config)]
    check_values(shared, values)
    return SweepSettings(name, shared, texts, sampler, pruner, trials, seed, metric, mode)


def _monitored(config: dict[str, Any]) -> tuple[str, str]:
    """Returns the metric that the checkpoint callback of a recipe monitors, and its mode."""
    for callback in config["trainer"].get("callbacks") or []:
        arguments = callback.get("init_args") or {}
        if callback["class_path"].endswith("Checkpoint") and arguments.get("monitor"):
            return arguments["monitor"], arguments.get("mode", "min")
    raise ConfigError(
        "Trials are judged by the metric that the recipe's BestCheckpoint monitors, and there is "
        "none. Add lightning_peft.tasks.BestCheckpoint to trainer.callbacks, with monitor and mode."
    )


def _one_process(config: dict[str, Any]) -> list[str]:
    """Returns the options that keep the trials in this process, on one device."""
    trainer = config["trainer"]
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes")
    if _count(devices or 1) > 1 or _count(nodes or 1) > 1 or torchrun_layout() is not None:
        raise ConfigError(
            f"trainer.devices={devices} and trainer.num_nodes={nodes}: the trials of a sweep train "
            "one after the other on one device. Set both to 1; for other devices, start other "
            "sweeps with CUDA_VISIBLE_DEVICES."
        )
    return ["--trainer.devices=1"] if devices in ("auto", -1, "-1") else []


def _count(devices: Any) -> int:
    """Returns how many devices are named; 1 or less where Lightning may choose."""
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(",").split(",")
    if isinstance(devices, list):
        return len(devices)
    return 1 if devices == "auto" else int(devices)


class Sweep:
    """A sweep on disk; :meth:`run` goes on with it where it is.

    Args:
        folder: The folder, below the root of its runs.

    Raises:
        ConfigError: If it is the folder of no sweep, or Optuna is not installed.
    """

    def __init__(self, folder: Path) -> None:
        optuna = _optuna()
        self.folder = folder
        try:
            content = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            self.settings = SweepSettings(**content)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{str(folder)!r} is not the folder of a sweep: {_SETTINGS} cannot be read "
                f"({first_line(error)}). Name the folder that the sweep printed when it began."
            ) from error
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
    def create(cls, root: Path, settings: SweepSettings) -> Sweep:
        """Makes the folder of a new sweep below ``root``, with copies of its configs.

        Raises:
            ConfigError: If nothing can be written there.
        """
        folder = RunFolder.create(root, f"sweep {settings.name}")
        folder.checkpoints.rmdir()
        words = []
        for word in settings.words:
            name, _, file = word.partition("=")
            if name == "--config":
                word = f"--config={shutil.copy(file, folder.path)}"
            words.append(word)
        folder.write(folder.path / _SETTINGS, {**asdict(settings), "words": words})
        return cls(folder.path)

    def run(self, show: Callable[[str], None]) -> bool:
        """Trains the trials that are left, one after the other.

        Args:
            show: Called with a line before and after each trial.

        Returns:
            Whether all are done; ``False`` after an interrupt, of which a checkpoint was saved.

        Raises:
            ConfigError: If another process is at work in the folder.
            LightningPeftError: If the first trial of all fails, most likely because of the recipe;
                or a disk is full.
        """
        with RunFolder(self.folder).claimed(), engine.quantized_bases_kept():
            self._queue()
            while len(done := self._done()) < self.settings.trials:
                if not self._trial(len(done), show):
                    return False
        return True

    def _queue(self) -> None:
        """Queues the trials that an earlier process left behind, and those of a grid."""
        state = _optuna().trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            known = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            self._study.enqueue_trial(known, user_attrs=dict(trial.user_attrs))
            self._study.tell(trial.number, state=state.FAIL)
        if self.settings.sampler == "grid":
            for combination in grid_of(self.settings.values):
                self._study.enqueue_trial(combination, skip_if_exists=True)

    def _done(self) -> list[Any]:
        """Returns Optuna's trials that came to an end of their own."""
        state = _optuna().trial.TrialState
        ended = self._study.get_trials(
            deepcopy=False, states=(state.COMPLETE, state.PRUNED, state.FAIL)
        )
        return [one for one in ended if one.state != state.FAIL or "error" in one.user_attrs]

    def _trial(self, number: int, show: Callable[[str], None]) -> bool:
        """Trains one trial; returns whether it came to its end."""
        state = _optuna().trial.TrialState
        done = self._done()
        # Of each trial its own, so that a sweep that was interrupted tries the same values.
        self._study.sampler = _sampler(self.settings.sampler, self.settings.seed + number)
        trial = self._study.ask(self._distributions)
        values = ", ".join(f"{key}={value}" for key, value in self._short(trial.params).items())
        place = f"trial {number + 1} of {self.settings.trials} ({values})"
        same = [one for one in done if one.params == trial.params and one.state == state.COMPLETE]
        if same:
            show(f"{place}: the same values as before, in {same[0].user_attrs['run']}")
            trial.set_user_attr("run", same[0].user_attrs["run"])
            self._study.tell(trial, same[0].value)
            return True
        show(place)
        folder = self._folder(trial, values)
        try:
            session, value = self._train(trial, folder, done)
        except Exception as error:
            of_values = isinstance(error, DivergenceError) or is_out_of_memory(error)
            if isinstance(error, StorageError) or not (done or of_values):
                # Left as it is: it is repeated once the disk, or the recipe, is right.
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

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each trial that came to an end, in order."""
        by_run = {one.user_attrs["run"]: one for one in self._done()}
        return [self._row(number, one) for number, one in enumerate(by_run.values(), 1)]

    def _row(self, number: int, trial: Any) -> dict[str, Any]:
        run = RunFolder(self.folder.parent / trial.user_attrs["run"])
        result = json.loads(run.result.read_text("utf-8")) if run.result.is_file() else {}
        values = {key: _number(value) for key, value in trial.params.items()}
        ended = trial.value is not None
        return {
            "trial": number,
            "state": {"COMPLETE": "finished", "FAIL": "failed"}.get(trial.state.name, "pruned"),
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


def _number(text: Any) -> Any:
    """Returns a value that was written as a text as the number that it is."""
    for kind in (int, float):
        try:
            return kind(text) if isinstance(text, str) else text
        except ValueError:
            continue
    return text


def _optuna() -> Any:
    try:
        optuna = import_module("optuna")
    except ImportError as error:
        raise ConfigError(
            "A sweep takes the package optuna: pip install 'lightning-peft[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(name: str, seed: int) -> Any:
    samplers = _optuna().samplers
    # A grid is a queue of trials, whose values are given.
    return samplers.TPESampler(seed=seed) if name == "tpe" else samplers.RandomSampler(seed)


def _pruner(name: str) -> Any:
    pruners = _optuna().pruners
    known = {"median": pruners.MedianPruner, "hyperband": pruners.HyperbandPruner}
    return known.get(name, pruners.NopPruner)()


def _free_memory() -> None:
    """Lets go of a run's module before the next one is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
