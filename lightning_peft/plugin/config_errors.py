"""Errors of configs and overrides, with suggestions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from lightning_peft.errors import similar_names

TOP_LEVEL_KEYS = (
    *("model", "data", "trainer", "seed_everything", "ckpt_path", "run_dir", "config"),
    # Of LightningCLI, for modules that make no optimizer of their own.
    *("optimizer", "lr_scheduler", "print_config", "help", "weights_only", "verbose"),
    # Of the commands themselves.
    *("resume", "json", "help-all"),
)
_HOME_PACKAGES = {
    "model": "lightning_peft.tasks",
    "data": "lightning_peft",
    "trainer": "lightning_peft",
}


def explain_parser_error(message: str, root: str) -> str:
    """Returns jsonargparse's error in plain words, with near names for unknown ones."""
    absent = re.findall(r"arguments are required: ([\w., ]+)", message)
    found = [
        *(f"--{name} is missing: name a recipe with --config" for name in absent),
        *_unknown_arguments(message),
        *_unknown_classes(message),
        *_unknown_keys(message, root),
    ]
    return "\n".join(dict.fromkeys(found)) or _wrong_value(message) or message


def _unknown_arguments(message: str) -> Iterable[str]:
    for path, option in re.findall(
        r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message
    ):
        module, _, name = path.rpartition(".")
        known = constructor_parameters(getattr(import_module(module), name))
        yield f"{option!r} is not an argument of {name}{similar_names(option, known)}"


def _unknown_classes(message: str) -> Iterable[str]:
    key = _key(message)
    place = _HOME_PACKAGES.get(key.partition(".")[0])
    patterns = (
        r"Problem with given class_path '([\w.]+)':\s+(?:module|No module|Unexpected|import)",
        r"Expected a dot import path string: ([\w.]+)",
    )
    for path in (path for pattern in patterns for path in re.findall(pattern, message)):
        module, _, name = path.rpartition(".")
        known = _classes(module, place)
        if not module:
            known = [one.rpartition(".")[2] for one in known]
        yield f"{key}={path!r}: there is no such class{similar_names(path, known)}"


def _classes(module: str, place: str | None) -> list[str]:
    found = []
    for name in dict.fromkeys([module, place or ""]):
        try:
            names = getattr(import_module(name), "__all__", ()) if name else ()
        except ImportError:
            continue
        found += [f"{name}.{one}" for one in names]
    return found


def _unknown_keys(message: str, root: str) -> Iterable[str]:
    trainer = inspect.signature(import_module(root).Trainer.__init__).parameters
    known = [*TOP_LEVEL_KEYS, *(f"trainer.{name}" for name in trainer if name != "self")]
    where = "" if "class_path" in message else "|Option '"
    pattern = rf"(?:unrecognized arguments: --|Key '|accept option '{where})([\w.-]+)"
    for key in re.findall(pattern, message):
        yield f"there is no {key!r}{near_key(key, known)}"


def near_key(key: str, known: Iterable[str]) -> str:
    """Returns the keys nearest to one, of which the first part may be what is wrong."""
    whole = similar_names(key, known)
    first, dot, rest = key.partition(".")
    near = similar_names(first, TOP_LEVEL_KEYS).removeprefix("; near names: ").partition(",")[0]
    if not dot or first in TOP_LEVEL_KEYS or not near or near == "trainer":
        return whole
    return f"; near names: {near}.{rest}"


def _key(message: str) -> str:
    found = re.findall(r'Parser key "([\w.]+)"', message)
    return found[-1] if found else "class_path"


def _wrong_value(message: str) -> str | None:
    value = re.search(r"(?:Given value: |Got value: )(.*)", message)
    literal = re.search(r"Literal\[(.*?)\]", message)
    if value is None or "NestedArg" in value[1]:
        return None
    key = _key(message[: value.start()])
    given = value[1].strip().strip("'\"")
    if literal is not None:
        words = re.findall(r"'([^']*)'", literal[1])
        hint = similar_names(given, words)
        return f"{key}={given!r} is none of {', '.join(words)}{hint}"
    kinds = re.findall(r"Expected an? <class '([\w.]+)'>", message)
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    kinds = [kind for kind in kinds if kind != "NoneType"]
    expected = " or ".join(dict.fromkeys(names.get(kind, kind) for kind in kinds))
    return f"{key}={given!r}: {expected} is expected" if expected else None


def constructor_parameters(cls: type) -> list[str]:
    """Returns the names of what a class takes, with those it hands on to the classes above it."""
    made: Any = [base.__init__ for base in cls.__mro__ if base is not object]  # type: ignore[misc]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [
        p.name
        for one in made
        for p in inspect.signature(one).parameters.values()
        if p.kind in named
    ]
    return [name for name in dict.fromkeys(found) if name != "self"]
