"""LightningCLI of this package, for both Lightning packages."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from textwrap import dedent
from typing import Any, Protocol

import torch
import yaml
from jsonargparse import Namespace

from lightning_peft.compat.lightning import config_parser
from lightning_peft.errors import ConfigError, LightningPeftError, similar_names
from lightning_peft.plugin.config_errors import explain_parser_error
from lightning_peft.plugin.namespace import (
    ROOTS,
    namespace,
    namespace_in_use,
    namespace_of_class,
)

# How every command parses: errors are explained here, and options are written in full.
STRICT = {"exit_on_error": False, "allow_abbrev": False}
# Cheap to make: their models and rows are loaded later.
_MADE = ("model", "data", "trainer.strategy")
_LINES_OF_LIGHTNING = (
    *(f"{root}.utilities.rank_zero" for root in ROOTS),
    *("lightning.fabric.utilities.rank_zero", "lightning_fabric.utilities.rank_zero"),
)
_NOISE = ("Tip: ", "TPU available: False", "to estimate number of stepping batches")
# The recorder of a short run logs every step; tasks move batches on purpose.
_NOISY_WARNINGS = (
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"You have overridden `transfer_batch_to_device` in `LightningModule`",
)


class RunHooks(Protocol):
    """What is done around a run of LightningCLI.

    Attributes:
        verbose: Whether messages of libraries are shown that are of no use to most.
    """

    verbose: bool

    def begin(self, config: Any, recipe: str, root: str) -> list[Any]:
        """Called with the config, which may be changed, and its YAML; returns more callbacks."""

    def end(self, trainer: Any, module: Any, datamodule: Any) -> None:
        """Called when the run has come to its end."""


def run_subcommand(subcommand: str, arguments: Sequence[str], hooks: RunHooks) -> None:
    """Runs ``fit``, ``validate``, ``test`` or ``predict`` as LightningCLI does."""
    with lightning_command(arguments, verbose=hooks.verbose) as root:
        # Lightning 2.6 with torch 2.13 says so in every run; seen on 2026-11-25.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")
        try:
            _recording_cli(root, hooks)(
                args=[subcommand, *qualify_optimizers(arguments)],
                save_config_callback=None,
                parser_kwargs={"prog": "lightning-peft", **STRICT, subcommand: STRICT},
            )
        except SystemExit as stop:
            # Lightning ends an interrupted process like a failed one.
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from stop
            raise


def find_modules_here() -> None:
    """Lets imports find modules of the current folder, as in a script."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


@contextmanager
def lightning_command(arguments: Sequence[str], verbose: bool = False) -> Iterator[str]:
    """Yields the root of a config's Lightning package.

    Within the body, a LightningCLI finds the user's modules, and its errors are explained.
    """
    find_modules_here()
    root = _namespace_of_config(arguments)
    with namespace(root), warnings.catch_warnings(), _without_noise(verbose):
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        try:
            yield root
        except argparse.ArgumentError as error:
            raise ConfigError(explain_parser_error(str(error), root)) from error
        except ValueError as error:
            if isinstance(error, LightningPeftError):
                raise
            raise ConfigError(_instantiation_problem(error, root)) from error


def parsed_config(arguments: Sequence[str], made: str = "") -> dict[str, Any]:
    """Returns a config and its overrides as ``fit`` reads them, or refuses them.

    ``made`` is a key; the strategy, or the class of this package, that it is an argument of is
    made, and checks its arguments. Nothing else is made.
    """
    with lightning_command(arguments) as root:
        cli = import_module(f"{root}.cli")

        class ParsingCLI(cli.LightningCLI):  # type: ignore[name-defined]
            def add_arguments_to_parser(self, parser: Any) -> None:
                for name in ("--run_dir", "--ckpt_path"):
                    parser.add_argument(name, type=str | None, default=None)

            def _set_seed(self) -> None:
                """Leaves the random numbers alone."""

            def instantiate_classes(self) -> None:
                part = next((part for part in _MADE if made.startswith(f"{part}.init_args.")), None)
                given = self.config.get(part) if part else None
                if isinstance(given, Namespace) and (
                    part == _MADE[-1] or given.class_path.startswith("lightning_peft.")
                ):
                    self.parser.instantiate(Namespace({part: given}))

        parsed = ParsingCLI(
            args=qualify_optimizers(arguments),
            run=False,
            save_config_callback=None,
            parser_kwargs=STRICT,
        )
    config: dict[str, Any] = parsed.config.as_dict()
    return config


def _instantiation_problem(error: ValueError, root: str) -> str:
    named = re.search(r"invalid strategy name: `strategy='([^']*)'`", str(error))
    if named is None:
        # Without all that jsonargparse tried.
        cause = str(error).partition("\nGiven value type:")[0]
        cause = re.sub(
            r"Does not validate against any of the Union.*?Errors:\n", "", cause, flags=re.S
        )
        cause = re.sub(r"\n +Given value(?: type)?:.*", "", cause)
        reasons = re.sub(r"\n? *- Expected an? <class .*>", "", cause).rstrip()
        # Where types are all that is wrong, they are the reason.
        cause = cause if not reasons or reasons.endswith(":") else reasons
        return f"Cannot instantiate the config: {dedent(cause).strip().removeprefix('- ')}"
    known = import_module(f"{root}.strategies").StrategyRegistry.available_strategies()
    near = similar_names(named[1], known)
    return f"trainer.strategy={named[1]!r} is not a strategy of Lightning{near}"


@contextmanager
def _without_noise(verbose: bool) -> Iterator[None]:
    """Keeps from the log what Lightning advertises, or says of hardware and steps that are not."""
    if verbose:
        yield
        return
    for message in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # Both packages share one logger for such lines: that of the one imported last.
    loggers = [logging.getLogger(name) for name in _LINES_OF_LIGHTNING]
    for logger in loggers:
        logger.addFilter(_is_not_noise)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_not_noise)


def _is_not_noise(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(part in text for part in _NOISE)


def _recording_cli(root: str, hooks: RunHooks) -> Any:
    cli = import_module(f"{root}.cli")

    class RecordingCLI(cli.LightningCLI):  # type: ignore[name-defined]
        """LightningCLI that calls the hooks."""

        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_argument(
                "--run_dir",
                type=str | None,
                default=None,
                help="Folder of this run; by default a new one below `runs`.",
            )

        def before_instantiate_classes(self) -> None:
            config = self.config[self.subcommand]
            kept = config.clone()
            for name in ("run_dir", "ckpt_path", "weights_only", "config"):
                kept.pop(name, None)
            recipe = config_parser(self).dump(kept, skip_unset=True, skip_validation=True)
            if config["trainer"].get("enable_model_summary") is None:
                # It counts packed 4-bit weights by their bytes; the strategy shows its own report.
                config["trainer"]["enable_model_summary"] = False
            self.trainer_defaults = {"callbacks": hooks.begin(config, recipe, root)}

        def _end(self) -> None:
            hooks.end(self.trainer, self.model, self.datamodule)

        after_fit = after_validate = after_test = after_predict = _end

    return RecordingCLI


def qualify_optimizers(arguments: Sequence[str]) -> list[str]:
    """Returns a command line in which optimizers of torch have their full names.

    LightningCLI takes short ones too, and other packages have classes of the same names; by the
    time it reads the command line, bitsandbytes and perhaps transformers are imported.
    """
    options = ("--optimizer", "--optimizer.class_path")
    named = list(arguments)
    for index, argument in enumerate(named):
        option, equals, value = argument.partition("=")
        if option in options and _is_torchs(value):
            named[index] = f"{option}{equals}torch.optim.{value}"
        elif index and named[index - 1] in options and _is_torchs(argument):
            named[index] = f"torch.optim.{argument}"
    return named


def _is_torchs(name: str) -> bool:
    return isinstance(getattr(torch.optim, name, None), type)


def _namespace_of_config(arguments: Sequence[str]) -> str:
    path = None
    parts = [piece for argument in arguments for piece in argument.split("=", 1)]
    for option, value in zip(parts, parts[1:], strict=False):
        if option == "--config":
            path = _class_path_in(value) or path
        elif option in ("--model", "--model.class_path"):
            path = value
    if path is None or "." not in path:
        return namespace_in_use()
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(f"model.class_path={path!r} cannot be imported: {error}") from error
    return (namespace_of_class(cls) if isinstance(cls, type) else None) or namespace_in_use()


def _class_path_in(file: str) -> str | None:
    try:
        with open(file, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except (OSError, yaml.YAMLError):
        # LightningCLI reads it again and says what is wrong.
        return None
    model = content.get("model") if isinstance(content, dict) else None
    return model.get("class_path") if isinstance(model, dict) else model
