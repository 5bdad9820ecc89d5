"""``adapter_config.json`` of other PEFT versions: each field is applied, named or refused.

A later version may have fields that decide what is computed. Their values tell how far that can be
judged: ``None``, ``False`` and empty ones are off; ``True``, lists and mappings switch something
on; numbers and texts may be the settings of something that is off.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.engine.configuration import config_class
from lightning_peft.errors import CheckpointError, ConfigError, itemize

# Written for those who load the model by its name, or never read from files by PEFT itself.
_NOT_SETTINGS = ("auto_mapping", "runtime_config")


def checked_fields(
    fields: Mapping[str, Any], folder: Path, *, allow_unknown: bool = False, warn: bool = True
) -> dict[str, Any]:
    """Returns the fields of ``adapter_config.json`` that the installed PEFT knows, of right types.

    Unknown fields that switch something on are refused; with ``allow_unknown`` they are warned of,
    as others that are set are where ``warn`` says so.
    """
    try:
        cls = config_class(fields["peft_type"])
    except ConfigError as error:
        raise CheckpointError(f"The adapter in {str(folder)!r}: {error}") from error
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    settings = {k: v for k, v in fields.items() if k not in _NOT_SETTINGS}
    problems = [
        f"{name}={value!r}: {_described(hints[name])} is meant"
        for name, value in settings.items()
        if name in known and not _fits(value, hints[name])
    ]
    if problems:
        raise CheckpointError(
            f"adapter_config.json of {str(folder)!r} has values of the wrong kind:"
            + itemize(problems)
        )
    unknown = {name: value for name, value in settings.items() if name not in known}
    for name, value in settings.items():
        if name in known and isinstance(value, dict):
            unknown |= _unknown_inside(name, value, hints[name])
    _judge(unknown, fields, folder, allow_unknown, warn)
    return {
        name: value
        for name, value in settings.items()
        # As PEFT's own default, which is an empty mapping for some.
        if name in known and (value is not None or known[name].default is None)
    }


def _judge(
    unknown: Mapping[str, Any],
    fields: Mapping[str, Any],
    folder: Path,
    allow_unknown: bool,
    warn: bool,
) -> None:
    written, here = fields.get("peft_version"), fields["peft_type"]
    by = f" It was written by PEFT {written}." if written else ""
    on = {k: v for k, v in unknown.items() if "." not in k and (v is True or _is_filled(v))}
    rest = {k: v for k, v in unknown.items() if k not in on and not _is_off(v)}
    if on and not allow_unknown:
        raise CheckpointError(
            f"adapter_config.json of {str(folder)!r} switches on what the installed PEFT does not "
            f"know for {here}:"
            + itemize(f"{name}={value!r}" for name, value in on.items())
            + f"\nWithout it, the adapter may compute something else.{by} Install a PEFT that "
            "knows it (pip install -U peft). If it makes no difference, remove the field from the "
            "file, or pass allow_unknown_fields=True."
        )
    named = {**on, **rest}
    if named and warn:
        warnings.warn(
            f"adapter_config.json of {str(folder)!r} sets fields that the installed PEFT does not "
            f"know for {here}, and they are not used:"
            + itemize(f"{name}={value!r}" for name, value in named.items())
            + f"\nIf they change what the adapter computes, it computes something else here.{by}",
            stacklevel=4,
        )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_filled(value: Any) -> bool:
    return isinstance(value, (dict, list)) and bool(value)


def _unknown_inside(name: str, value: Mapping[str, Any], hint: Any) -> dict[str, Any]:
    """Returns the keys of a nested config that its class does not have, as ``name.key``."""
    classes = [cls for cls in _alternatives(hint) if dataclasses.is_dataclass(cls)]
    if not classes:
        return {}
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    return {f"{name}.{key}": inner for key, inner in value.items() if key not in known}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, kind) for kind in _alternatives(hint))


def _fits_one(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if kind is type(None) or value is None:
        return kind is type(None) and value is None
    if origin is typing.Literal:
        # PEFT lists examples there, such as "pissa_niter_[number of iters]".
        return any(type(value) is type(option) for option in inner)
    if kind in (int, float):
        # PEFT's annotation is int where any number will do, as for lora_alpha.
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    container = origin or kind
    if container in (list, set, tuple):
        items = inner[:1] or (Any,)
        return isinstance(value, list) and all(_fits(item, items[0]) for item in value)
    if container is dict:
        values = inner[1] if inner else Any
        return isinstance(value, dict) and all(_fits(item, values) for item in value.values())
    if not isinstance(kind, type):
        return True
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return isinstance(value, str if issubclass(kind, enum.Enum) else kind)


def _described(hint: Any) -> str:
    names = {int: "a number", float: "a number", bool: "true or false", str: "a text"}
    words = []
    for kind in _alternatives(hint):
        container = typing.get_origin(kind) or kind
        if container is typing.Literal:
            words += [names.get(type(option), "a text") for option in typing.get_args(kind)]
        elif container in (list, set, tuple):
            words.append("a list")
        elif container is dict or dataclasses.is_dataclass(container):
            words.append("a mapping")
        elif container is type(None):
            words.append("null")
        else:
            words.append(names.get(container, "a text"))
    return " or ".join(dict.fromkeys(words))
