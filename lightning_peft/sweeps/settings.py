"""Sweep settings and search space, validated before training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import ConfigError, LightningPeftError, itemize, similar_names
from lightning_peft.plugin.launch import torchrun_layout
from lightning_peft.plugin.lightning_cli import parsed_config

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Where a name without dots is looked for.
_PLACES = (
    *("model.init_args.", "data.init_args.", "trainer.strategy.init_args."),
    *("optimizer.init_args.", "lr_scheduler.init_args.", "trainer."),
)
_SHORT = {"lr": "learning_rate"}
# What each run has of its own, or all runs have in common.
_REFUSED = ("run_dir", "ckpt_path", "config", "trainer.devices", "trainer.num_nodes")
_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_RANGE = re.compile(rf"{_NUMBER}\.\.{_NUMBER}(:\w*)?")
# Commas part values, but not those of a list, a mapping or a quoted text.
_VALUE = r"""(?:[^,\[{"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*')+"""


@dataclass(frozen=True)
class Values:
    """What one key is tried with: some values as they are written, or all between two numbers.

    Attributes:
        texts: The values; of a range its ends.
        is_range: Whether numbers between the two are tried.
        log: Whether a range is sampled by its logarithm.
    """

    texts: tuple[str, ...]
    is_range: bool = False
    log: bool = False

    def distribution(self) -> BaseDistribution:
        """Returns this for Optuna."""
        distributions = import_module("optuna.distributions")
        if not self.is_range:
            return distributions.CategoricalDistribution(self.texts)
        if self.is_whole:
            return distributions.IntDistribution(*map(int, self.texts), log=self.log)
        return distributions.FloatDistribution(*map(float, self.texts), log=self.log)

    @property
    def is_whole(self) -> bool:
        """Whether this is a range of whole numbers."""
        return self.is_range and all(re.fullmatch(r"[-+]?\d+", text) for text in self.texts)


def parse_values(text: str) -> Values:
    """Returns the values behind the ``=`` of ``--set``: ``8,16``, ``1e-5..1e-3``, ``1..9:log``."""
    found = _RANGE.fullmatch(text)
    if found is None:
        if not re.fullmatch(f"{_VALUE}(?:,{_VALUE})*", text):
            raise ConfigError(f"{text!r} has an empty value, or a bracket that is not closed")
        texts = tuple(one.strip() for one in re.findall(_VALUE, text))
        twice = sorted({one for one in texts if texts.count(one) > 1})
        if twice:
            raise ConfigError(f"{', '.join(twice)} is there twice")
        return Values(texts)
    low, high, scale = found.groups()
    if scale not in (None, ":log"):
        raise ConfigError(f"{text!r} ends with {scale}; a range can end with :log")
    if not float(low) < float(high):
        raise ConfigError(f"{text!r} does not begin with the smaller number")
    if scale and float(low) <= 0:
        raise ConfigError(f"{text!r} has no logarithm, since it begins at {low}")
    return Values((low, high), True, bool(scale))


def parse_sets(words: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the full key of each ``NAME=VALUES``, with its values as they were written."""
    found: dict[str, str] = {}
    problems = []
    for word in words:
        name, equals, text = word.partition("=")
        try:
            if not equals or not text.strip():
                raise ConfigError("values are missing (--set r=8,16)")
            parse_values(text)
            key = _full_key(name.strip(), config)
            if key in found:
                raise ConfigError(f"{key} is there twice")
            found[key] = text.strip()
        except ConfigError as error:
            problems.append(f"--set {word}: {error}")
    if problems:
        raise ConfigError("The values to try cannot be read:" + itemize(problems))
    return found


def _full_key(name: str, config: Mapping[str, Any]) -> str:
    key = name if name in _REFUSED else _found_key(name, config)
    if key in _REFUSED:
        raise ConfigError(f"{key} is the same for all trials, or of each its own")
    return key


def _found_key(name: str, config: Mapping[str, Any]) -> str:
    if name == "seed_everything":
        return name
    if "." in name:
        return _with_init_args(name, config)
    for short in (name, _SHORT.get(name, name)):
        known = [f"{place}{short}" for place in _PLACES if short in _part(config, place)]
        if len(known) > 1:
            raise ConfigError(f"{name} is several keys: {', '.join(known)}. Write one of them")
        if known:
            return known[0]
    names = [*_SHORT, *(key for place in _PLACES for key in _part(config, place))]
    raise ConfigError(f"the recipe has no key {name!r}{similar_names(name, names)}")


def _with_init_args(name: str, config: Mapping[str, Any]) -> str:
    """Returns a key in full: ``trainer.strategy.r`` without ``init_args`` is read as well."""
    words: list[str] = []
    for word in name.split("."):
        part = _part(config, ".".join([*words, ""]))
        if "class_path" in part and word not in ("class_path", "init_args", "dict_kwargs"):
            words.append("init_args")
        words.append(word)
    return ".".join(words)


def _part(config: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    part: Any = config
    for name in place.split(".")[:-1]:
        part = part.get(name) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def check_values(words: Sequence[str], sets: Mapping[str, Values]) -> None:
    """Checks every value, with the others as they are in the recipe."""
    problems = []
    for key, values in sets.items():
        for text in values.texts:
            try:
                config = parsed_config([*words, f"--{key}={text}"], made=key)
                given = _part(config, key).get(key.rpartition(".")[2])
                if values.is_whole and isinstance(given, float):
                    low, high = map(float, values.texts)
                    raise ConfigError(f"where fractions are possible, write {low}..{high}")
            except LightningPeftError as error:
                problems.append(f"{key}={text}: {error}")
    if problems:
        raise ConfigError(
            "The recipe does not take these values:" + itemize(dict.fromkeys(problems), 40)
        )


def grid_of(sets: Mapping[str, Values]) -> list[dict[str, str]]:
    """Returns all combinations, the first key changing last."""
    ranges = [key for key, values in sets.items() if values.is_range]
    if ranges:
        raise ConfigError(
            f"A grid takes values and no range, which {', '.join(ranges)} has. Write values with "
            "commas, or sample some of the range with --sampler tpe --trials N."
        )
    texts = [values.texts for values in sets.values()]
    return [dict(zip(sets, one, strict=True)) for one in product(*texts)]


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
    """Returns the package, which does not log what this one shows itself."""
    try:
        optuna = import_module("optuna")
    except ImportError as error:
        raise ConfigError(
            "A sweep takes the package optuna: pip install 'lightning-peft[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
