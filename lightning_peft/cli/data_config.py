"""The data module described by configs and the command line."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from yaml import safe_dump, safe_load

from lightning_peft.errors import ConfigError, similar_names
from lightning_peft.recipe_files import find_recipe, resolved, resolved_recipes

_DEFAULT = "lightning_peft.SupervisedData"
# What only concerns the order and loading of batches.
_OF_TRAINING = {"shuffle_seed", "num_workers", "length_grouping", "packing"}
# Parts of a recipe besides its data.
_OF_CONFIGS = {"model", "trainer", "seed_everything", "run_dir", "ckpt_path"}
_OF_CONFIGS |= {"optimizer", "lr_scheduler"}


def data_from_config(
    configs: Sequence[str],
    words: Sequence[str],
    default: str = _DEFAULT,
    options: Sequence[str] = (),
) -> Any:
    """Returns the data module that configs and the command line describe.

    Overrides of the model and the Trainer are checked as ``fit`` does, and change nothing here.
    """
    import jsonargparse

    path, arguments = _data_section(configs, default)
    words, overrides = _split_arguments(words)
    if overrides:
        _check(configs, overrides)
    cls = _class(path, words)
    parser = jsonargparse.ArgumentParser(
        prog="lightning-peft preview",
        description=cls.__doc__,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with these arguments.")
    parser.add_class_arguments(cls, skip=_OF_TRAINING)
    settings = {key: value for key, value in arguments.items() if key not in _OF_TRAINING}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.yaml"
        file.write_text(safe_dump(settings), encoding="utf-8")
        try:
            parsed = parser.parse_args([f"--config={file}", *words]).as_dict()
        except (jsonargparse.ArgumentError, ValueError) as error:
            raise ConfigError(_explained(str(error), cls, options)) from error
    parsed.pop("config", None)
    return cls(**parsed)


def _class(path: str, words: Sequence[str]) -> Any:
    named = [word.partition("=")[2] for word in words if word.startswith("--class_path=")]
    path = named[-1] if named else path
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name, None) if module else None
    except ImportError:
        cls = None
    if cls is None:
        from lightning_peft.data.shapes import SHAPES

        # A shape may be for either of two.
        names = " or ".join(shape.data_class for shape in SHAPES.values()).split(" or ")
        known = dict.fromkeys(f"lightning_peft.{name}" for name in names)
        raise ConfigError(
            f"data.class_path={path!r}: there is no such class{similar_names(path, known)}."
        )
    from lightning_peft.data.row_data_module import RowDataModule

    if not isinstance(cls, type) or not issubclass(cls, RowDataModule):
        raise ConfigError(
            f"data.class_path={path!r} is not a data module of this package that reads row by row, "
            "so there are none to show. preview is for lightning_peft.SupervisedData and its like."
        )
    return cls


def _explained(message: str, cls: type, options: Sequence[str]) -> str:
    from lightning_peft.plugin import config_errors

    key = message.partition("unrecognized arguments: --")[2].partition("=")[0].partition(" ")[0]
    if not key:
        from lightning_peft.plugin.namespace import ROOTS

        return str(config_errors.explain_parser_error(message, ROOTS[1]))
    ours = [option.removeprefix("--") for option in options]
    known = dict.fromkeys(
        [*config_errors.constructor_parameters(cls), *ours, *config_errors.TOP_LEVEL_KEYS]
    )
    return f"--{key}: {cls.__name__} has no such argument{config_errors.near_key(key, known)}"


def _split_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments of the data as they are in Python, and overrides of the rest."""
    ours: list[str] = []
    others: list[str] = []
    target = ours
    for word in words:
        if word.startswith("--"):
            first = word.removeprefix("--").partition("=")[0].partition(".")[0].replace("-", "_")
            target = others if first in _OF_CONFIGS else ours
        target.append(as_option(word) if target is ours else word)
    return ours, others


def _check(configs: Sequence[str], overrides: Sequence[str]) -> None:
    contents = [safe_load(resolved(find_recipe(name))) for name in configs]
    if not any(isinstance(content, dict) and "model" in content for content in contents):
        raise ConfigError(
            f"{overrides[0]} is for a config with a model, and there is none. Name a recipe with "
            "--config, or leave it out."
        )
    from lightning_peft.plugin.lightning_cli import parsed_config

    with resolved_recipes([*(f"--config={name}" for name in configs), *overrides]) as words:
        parsed_config(words)


def _data_section(configs: Sequence[str], default: str) -> tuple[str, dict[str, Any]]:
    """Returns the class of the data and its arguments, the last config on top."""
    path = default
    arguments: dict[str, Any] = {}
    for name in configs:
        content = safe_load(resolved(find_recipe(name))) or {}
        if not isinstance(content, dict):
            raise ConfigError(f"--config {name!r} holds no keys, but {content!r}.")
        part = content.get("data", content)
        if not isinstance(part, dict):
            # A file with the arguments themselves, in which `data` is the place of the rows.
            part = {"init_args": content}
        elif "class_path" not in part and "init_args" not in part:
            part = {"init_args": {key: part[key] for key in part if key not in _OF_CONFIGS}}
        path = part.get("class_path", path)
        arguments |= part.get("init_args", {})
    return path, arguments


def as_option(word: str) -> str:
    """Returns an option as the Python argument it is: --skip-bad-rows, --data.init_args.x."""
    if not word.startswith("--") or word == "--":
        return word
    name, equals, value = word.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    name = name.removeprefix("data.init_args.").removeprefix("data.")
    return f"--{name}{equals}{value}"
