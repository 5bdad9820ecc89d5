"""Search space of a sweep, validated before training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import ConfigError, LightningPeftError, itemize, similar_names
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
    """Returns the values behind the ``=`` of ``--set``: ``8,16``, ``1e-5..1e-3``, ``1..9:log``.

    Raises:
        ConfigError: If it is neither values nor a range.
    """
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
    """Returns the full key of each ``NAME=VALUES``, with its values as they were written.

    Args:
        words: What ``--set`` was given.
        config: The recipe, as it is read.

    Raises:
        ConfigError: With all problems: names that the recipe has not or several times, and
            values that cannot be read.
    """
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
    """Checks every value, with the others as they are in the recipe.

    Args:
        words: The arguments of ``fit``.
        sets: Values by full key.

    Raises:
        ConfigError: If the recipe does not take some of them, with all of these.
    """
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
    """Returns all combinations, the first key changing last.

    Raises:
        ConfigError: If there is a range, which has no grid.
    """
    ranges = [key for key, values in sets.items() if values.is_range]
    if ranges:
        raise ConfigError(
            f"A grid takes values and no range, which {', '.join(ranges)} has. Write values with "
            "commas, or sample some of the range with --sampler tpe --trials N."
        )
    texts = [values.texts for values in sets.values()]
    return [dict(zip(sets, one, strict=True)) for one in product(*texts)]
