"""Sweep settings and their validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_peft.errors import ConfigError
from lightning_peft.plugin.launch import torchrun_layout
from lightning_peft.plugin.lightning_cli import parsed_config
from lightning_peft.sweeps.values import Values, check_values, grid_of, parse_sets, parse_values


@dataclass(frozen=True)
class SweepSettings:
    """What ``sweep.json`` holds.

    Attributes:
        name: Of the recipe.
        words: The arguments of ``fit`` that all trials share; configs are copies in the folder,
            and in ``sweep.json`` their names alone.
        sets: The values as they were written, by full key.
        sampler: ``"grid"``, ``"random"`` or ``"tpe"``.
        pruner: ``"none"``, ``"median"`` or ``"hyperband"``.
        trials: How many there are.
        seed: Of the sampler.
        metric: What trials are judged by.
        mode: Whether the least (``"min"``) or the greatest (``"max"``) value is best.
        directory: Where the sweep was begun, from which recipes may name their files.
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
    directory: str = field(default_factory=lambda: str(Path.cwd()))

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
        sampler: As in :class:`SweepSettings`; by default a grid, with ranges or ``trials`` TPE.
        trials: How many runs; a grid has as many as combinations.
        pruner: As in :class:`SweepSettings`.
        seed: Of the sampler.

    Raises:
        ConfigError: If something of it does not go together, with all values that are wrong.
    """
    config = parsed_config(words)
    import_optuna()
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
    if seed < 0:
        raise ConfigError(f"--seed {seed} is not a seed, which is 0 or more.")
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


def import_optuna() -> Any:
    """Returns the package, which does not log what this one shows itself.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        optuna = import_module("optuna")
    except ImportError as error:
        raise ConfigError(
            "A sweep takes the package optuna: pip install 'lightning-peft[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
