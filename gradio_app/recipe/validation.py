"""Validation of a visitor's recipe; all problems are reported at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from gradio_app.errors import UserError
from gradio_app.guards import checked_revision, shortened
from gradio_app.recipe import allowlist
from gradio_app.recipe.content import is_series, value_at, with_value
from gradio_app.recipe.model_files import (
    cached_folder,
    remote_code_files,
    validate_folder,
    validate_gguf,
)
from gradio_app.recipe.paths import AllowedPaths
from gradio_app.recipe.presets import MODELS
from gradio_app.recipe.yaml_text import parse_yaml
from gradio_app.settings import Settings
from lightning_peft.recipe_files import recipe_files
from lightning_peft.task_registry import TASKS

_WORD = re.compile(r"[\w.{}=:,%+*()|\\^$\[\] -]{0,300}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OF_CLASSES = {"class_path", "init_args", "dict_kwargs"}
_MODEL, _DATA = "model.init_args.", "data.init_args."
_TEMPLATES = (None, "chatml", "plain", "raw")


def validate_recipe(text: str, settings: Settings, owner: str) -> dict[str, Any]:
    """Returns a recipe as it would be run: checked, with existing places and this page's limits."""
    return validate_content(parse_yaml(text), settings, owner)


def validate_content(content: dict[str, Any], settings: Settings, owner: str) -> dict[str, Any]:
    """Does the same for a recipe that has been parsed."""
    check = _Check(copy.deepcopy(content), settings, owner)
    check.everything()
    if check.problems:
        raise UserError("checks.all", problems=check.problems)
    return with_revision(check.content)


class _Check:
    def __init__(self, content: dict[str, Any], settings: Settings, owner: str) -> None:
        self.content, self.settings = content, settings
        self.places = AllowedPaths(settings, owner)
        self.problems: list[UserError] = []

    def everything(self) -> None:
        for key in sorted(set(self.content) - allowlist.TOP):
            self._refuse("checks.unknown", where=shortened(key))
        model = self._part("model", frozenset(spec.module for spec in TASKS.values()))
        data = self._part("data", frozenset(spec.data for spec in TASKS.values()))
        trainer = self.content.get("trainer")
        if not isinstance(trainer, dict):
            self._refuse("checks.part", where="trainer")
            trainer = {}
        self._trainer(trainer)
        self._model(model)
        self._data(data)
        if self.settings.space:
            self._space(model, data, trainer)
        self._limits(data, trainer)

    def _refuse(self, key: str, **values: object) -> None:
        self.problems.append(UserError(key, **values))

    def _try(self, holder: dict[str, Any], key: str, check: Callable[[Any], Any]) -> None:
        """Puts what ``check`` makes of a value into its place; ``None`` stays."""
        if holder.get(key) is None:
            return
        try:
            holder[key] = check(holder[key])
        except UserError as refused:
            self.problems.append(UserError("checks.at", where=key, problem=[refused]))

    def _part(self, key: str, classes: frozenset[str]) -> dict[str, Any]:
        """Returns the arguments of the class at the top-level key."""
        part = self.content.get(key)
        if not isinstance(part, dict) or "class_path" not in part:
            self._refuse("checks.part", where=key)
            return {}
        return self._class(part, key, classes)

    def _class(self, part: Any, where: str, classes: frozenset[str]) -> dict[str, Any]:
        """Returns the arguments of a class that may be made, and checks that they make none."""
        if not isinstance(part, dict) or not set(part) <= {"class_path", "init_args"}:
            self._refuse("checks.class_form", where=where, value=shortened(part))
            return {}
        path = part.get("class_path")
        if not isinstance(path, str) or path not in classes:
            known = ", ".join(sorted(name for name in classes if name.startswith("lightning")))
            self._refuse("checks.class", where=where, value=shortened(path), known=known)
        arguments = part.get("init_args")
        if arguments is None:
            arguments = {}
            if where in ("model", "data"):
                part["init_args"] = arguments
        if not isinstance(arguments, dict):
            self._refuse("checks.class_form", where=where, value=shortened(arguments))
            return {}
        for name, value in arguments.items():
            # jsonargparse appends at ``name+`` and walks into ``a.b``, past the checks by name.
            if not _NAME.fullmatch(name):
                self._refuse("checks.unknown", where=f"{where}.{shortened(name)}")
            if _contains_class_path(value):
                self._refuse("checks.nested", where=f"{where}.{name}")
            if name in allowlist.ONLY_NULL and value is not None:
                self._refuse("checks.only_null", where=f"{where}.{name}")
        return arguments

    def _trainer(self, trainer: dict[str, Any]) -> None:
        for key in [key for key in allowlist.OF_A_RUN if trainer.get(key, 0) is None]:
            del trainer[key]
        for key, value in trainer.items():
            if key in ("strategy", "callbacks", "logger"):
                continue
            if key not in allowlist.TRAINER:
                self._refuse("checks.unknown", where=f"trainer.{shortened(key)}")
            elif isinstance(value, str) and not _WORD.fullmatch(value):
                self._refuse("checks.at_value", where=f"trainer.{key}", value=shortened(value))
            elif _contains_class_path(value) or isinstance(value, dict) and key != "max_time":
                self._refuse("checks.nested", where=f"trainer.{key}")
        strategy = trainer.get("strategy")
        if strategy is not None and strategy not in list(allowlist.STRATEGY_WORDS):
            arguments = self._class(strategy, "trainer.strategy", allowlist.STRATEGIES)
            self._words(arguments, "trainer.strategy")
        self._many(trainer.get("callbacks"), "trainer.callbacks", allowlist.CALLBACKS)
        logger = trainer.get("logger")
        if not (logger is None or isinstance(logger, bool)):
            loggers = allowlist.LOGGERS
            if not self.settings.space:
                loggers = loggers | allowlist.PERSONAL_LOGGERS
            self._many(logger if isinstance(logger, list) else [logger], "trainer.logger", loggers)

    def _many(self, parts: Any, where: str, classes: frozenset[str]) -> None:
        if parts is None:
            return
        if not isinstance(parts, list):
            self._refuse("checks.class_form", where=where, value=shortened(parts))
            return
        for part in parts:
            self._words(self._class(part, where, classes), where)

    def _words(self, arguments: dict[str, Any], where: str) -> None:
        """Checks that no text among the arguments is a path."""
        for name, value in arguments.items():
            for text in _strings(value):
                if not _WORD.fullmatch(text) or ".." in text or text.startswith("-"):
                    self._refuse("checks.at_value", where=f"{where}.{name}", value=shortened(text))

    def _model(self, model: dict[str, Any]) -> None:
        before = len(self.problems)
        for key in ("model", "checkpoint"):
            self._try(model, key, self.places.model)
        self._try(model, "revision", checked_revision)
        self._fields(model, "config", "model.config")
        rewards = model.get("rewards") or []
        names = rewards if isinstance(rewards, list) else [rewards]
        if not all(isinstance(name, str) and name in allowlist.REWARDS for name in names):
            allowed = ", ".join(sorted(allowlist.REWARDS))
            self._refuse("checks.rewards", value=shortened(rewards), known=allowed)
        trusted = model.get("trust_remote_code")
        if trusted:
            if self.settings.space:
                self._refuse("checks.remote_here")
            elif trusted is not True:
                self._refuse("checks.remote")
            else:
                try:
                    checked_revision(model.get("revision"), commit=True)
                except UserError:
                    self._refuse("checks.remote")
        # Nothing is revealed about a path that was refused.
        known = len(self.problems) == before and isinstance(model.get("model"), str)
        if known and model.get("config") is None:
            try:
                check_files(model["model"], model.get("revision"), bool(trusted))
            except UserError as refused:
                self.problems.append(UserError("checks.at", where="model", problem=[refused]))

    def _data(self, data: dict[str, Any]) -> None:
        for key in ("data", "validation_data", "test_data"):
            self._try(data, key, self.places.data)
        if self.content.get("data") and data.get("data") is None:
            self._refuse("checks.no_rows")
        for key in ("tokenizer", "processor", "processor_config", "feature_extractor"):
            if isinstance(data.get(key), dict):
                self._fields(data, key, f"data.{key}")
            else:
                self._try(data, key, self.places.model)
        for key in ("hub_revision", "tokenizer_revision", "processor_revision"):
            self._try(data, key, checked_revision)
        self._try(data, "skip_bad_rows", self.places.written)
        for key in ("hub_config", "hub_splits"):
            self._words({key: data.get(key)}, "data")

    def _fields(self, holder: dict[str, Any], key: str, where: str) -> None:
        """Checks a transformers configuration: names and numbers, no code and no paths."""
        fields = holder.get(key)
        if fields is None:
            return
        if not isinstance(fields, dict):
            self._refuse("checks.class_form", where=where, value=shortened(fields))
            return
        internal = [name for name in fields if str(name).startswith("_")]
        if internal or {"auto_map", "trust_remote_code"} & set(fields):
            self._refuse("checks.nested", where=where)
        self._words(fields, where)

    def _space(self, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> None:
        """Checks what strangers may not ask of a shared machine."""
        most = self.settings.limits.parameters
        name = model.get("model")
        if most is not None and isinstance(name, str) and model.get("config") is None:
            size = next((model.parameters for model in MODELS if model.name == name), None)
            if size is None or size > most:
                self._refuse("checks.model_size", name=shortened(name), most=f"{most / 1e9:g}")
        if model.get("config") is not None and model["config"] not in bundled_configs():
            self._refuse("checks.config_here")
        if data.get("chat_template") not in _TEMPLATES:
            self._refuse("checks.template_here")
        workers = data.get("num_workers") or 0
        if not isinstance(workers, int) or workers > 1:
            self._refuse("checks.workers_here", most=1)
        if trainer.get("devices") not in (None, "auto", 1) or trainer.get("num_nodes", 1) != 1:
            self._refuse("checks.devices_here")

    def _limits(self, data: dict[str, Any], trainer: dict[str, Any]) -> None:
        """Sets this page's limits where the recipe has none, and refuses what is above them."""
        limits = self.settings.limits
        if limits.rows is not None and not is_series(self.content):
            self._most(data, "limit", limits.rows)
        if limits.steps is not None:
            self._most(trainer, "max_steps", limits.steps)

    def _most(self, holder: dict[str, Any], key: str, most: int) -> None:
        value = holder.get(key)
        if value is None or value == -1:
            holder[key] = most
        elif not isinstance(value, int) or not 0 < value <= most:
            self._refuse("checks.limit", where=key, value=shortened(value), most=most)


def with_revision(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe whose tokenizer or processor is read at the revision of its model.

    That is where both have the same name, the model has a revision, and the data names none.
    """
    model, revision = (value_at(content, f"{_MODEL}{key}", None) for key in ("model", "revision"))
    for key in ("tokenizer", "processor"):
        same = model is not None and value_at(content, f"{_DATA}{key}", None) == model
        if revision and same and value_at(content, f"{_DATA}{key}_revision", None) is None:
            content = with_value(content, f"{_DATA}{key}_revision", revision)
    return content


def remote_code_model(content: dict[str, Any]) -> str | None:
    """Returns the model whose own code a recipe lets be run; ``None`` if it lets none."""
    arguments = value_at(content, "model.init_args", None)
    if not isinstance(arguments, dict) or not arguments.get("trust_remote_code"):
        return None
    return str(arguments.get("model"))


def check_files(name: str, revision: object, trusted: bool) -> None:
    """Refuses what the files on this machine show to be no model that a run can load.

    That is a folder without a whole model, or a model that needs code of its own which may not be
    run.
    """
    if Path(name).is_absolute():
        if Path(name).suffix.lower() == ".gguf":
            validate_gguf(Path(name))
            return
        validate_folder(Path(name))
        if trusted or remote_code_files(Path(name)):
            # A folder has no commit that could be named, and changes without a trace.
            raise UserError("checks.remote_folder", path=shortened(Path(name).name))
    elif ":" not in name and not trusted:
        found = cached_folder(name, revision if isinstance(revision, str) else None)
        files = remote_code_files(found) if found is not None else []
        if files:
            raise UserError("checks.own_code", name=name, files=", ".join(files))


def _contains_class_path(value: Any) -> bool:
    if isinstance(value, dict):
        names = {part.rstrip("+") for key in value for part in str(key).split(".")}
        return bool(names & _OF_CLASSES) or any(map(_contains_class_path, value.values()))
    return isinstance(value, list) and any(map(_contains_class_path, value))


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in (*value.keys(), *value.values()) for text in _strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _strings(inner)]
    return [value] if isinstance(value, str) else []


@cache
def bundled_configs() -> tuple[dict[str, Any], ...]:
    """Returns the configurations of tiny random models that the recipes build."""
    contents = (parse_yaml(file.read_text(encoding="utf-8")) for file in recipe_files().values())
    found = (content.get("model", {}).get("init_args", {}).get("config") for content in contents)
    return tuple(config for config in found if config)
