"""Conversion of LoRA and QLoRA arguments to PEFT configs.

The configs themselves, their validation and their file format belong to PEFT; this module only
fills them, checks what they let through, and turns them into plain JSON values.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, EvaConfig, LoraConfig, LoraGAConfig, PeftConfig
from peft.tuners.lora.config import CordaConfig

from lightning_peft.arguments import LoRAFields
from lightning_peft.engine.methods.lora_config import (
    LOFTQ,
    is_pattern,
    loftq_settings,
    lora_problems,
)
from lightning_peft.engine.methods.registry import METHODS, method_of, not_injected, refuse_method
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.errors import ConfigError, itemize

_DATA_CONFIGS: dict[Any, tuple[str, Any]] = {
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}
# Of methods that list no decisive fields: where adapters go, how they are read, and what they
# started from.
_NOT_DECISIVE = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "init_ia3_weights",
    "save_projection",
)


def lora_config(arguments: LoRAFields | None = None) -> LoraConfig:
    """Fills a ``peft.LoraConfig``; without arguments, with the defaults of this package."""
    arguments = arguments or LoRAFields()
    fields: dict[str, Any] = {
        field.name: getattr(arguments, field.name) for field in dataclasses.fields(LoRAFields)
    }
    if fields["lora_alpha"] is None and isinstance(arguments.r, int):
        fields["lora_alpha"] = 2 * arguments.r
    if fields["target_modules"] is None:
        fields["target_modules"] = "all-linear"
    for name in ("rank_pattern", "alpha_pattern"):
        fields[name] = fields[name] or {}
    if arguments.init_lora_weights == "loftq":
        fields["loftq_config"] = LOFTQ
    problems = lora_problems(fields)
    if problems:
        raise ConfigError("These LoRA settings cannot work:" + itemize(problems))
    config: LoraConfig = _make_config(LoraConfig, fields)
    _check_saved_modules(config)
    return config


def _make_config(cls: Any, fields: Mapping[str, Any]) -> Any:
    """Returns ``cls(**fields)``, also for indices of blocks with ``"all-linear"``.

    PEFT refuses the pair when a config is made, since it would ignore the indices. Here they are
    resolved together, with the names of the lists that they count in.
    """
    indices = fields.get("layers_to_transform")
    later: dict[str, Any] = {}
    if indices is not None and not is_pattern(fields.get("target_modules")):
        named = ("layers_to_transform", "layers_pattern")
        later = {name: fields[name] for name in named if name in fields}
        fields = {**fields, **dict.fromkeys(later)}
    if fields.get("init_lora_weights") in _DATA_CONFIGS:
        name, kind = _DATA_CONFIGS[fields["init_lora_weights"]]
        given = fields.get(name) or {}
        fields = {**fields, name: kind(**given) if isinstance(given, Mapping) else given}
    if fields.get("init_lora_weights") == "loftq":
        # PEFT requires scipy for it, and does not use it.
        later |= {"init_lora_weights": "loftq", "loftq_config": loftq_settings(fields)}
        fields = {**fields, "init_lora_weights": True, "loftq_config": {}}
    try:
        with warnings.catch_warnings():
            # They are drawn again from the key, which is recorded.
            warnings.filterwarnings("ignore", "Specified to not save")
            config = cls(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{cls.__name__} does not accept these settings: {error}") from error
    for name, value in later.items():
        setattr(config, name, value)
    return config


def as_peft_config(config: PeftConfig | Mapping[str, Any]) -> PeftConfig:
    """Returns ``config`` itself, or the config that a mapping with a ``peft_type`` describes."""
    if isinstance(config, Mapping):
        config = _from_mapping(config)
    refuse_method(config)
    _check_saved_modules(config)
    checked: PeftConfig = method_of(config).checked_config(config)
    return checked


def _check_saved_modules(config: PeftConfig) -> None:
    saved: Any = getattr(config, "modules_to_save", None)
    named = saved is None or all(isinstance(name, str) and name for name in saved)
    if isinstance(saved, str) or not named:
        raise ConfigError(
            f"modules_to_save={saved!r}: a list of names of submodules, such as ['classifier']."
        )


def _from_mapping(fields: Mapping[str, Any]) -> PeftConfig:
    if "peft_type" not in fields:
        raise ConfigError(
            f"peft_config={dict(fields)!r} does not say which method it is for. Add `peft_type`, "
            "for example `peft_type: LORA`."
        )
    cls = config_class(fields["peft_type"])
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigError(
            f"{', '.join(map(repr, unknown))} in peft_config: {cls.__name__} has no such field. "
            f"It has: {', '.join(sorted(known))}."
        )
    left_out = [
        name
        for name in METHODS[str(to_primitives(fields["peft_type"]))].from_trainer
        if fields.get(name) is None
    ]
    # PEFT makes no config without them.
    config: PeftConfig = _make_config(cls, {**fields, **dict.fromkeys(left_out, sys.maxsize)})
    for name in left_out:
        setattr(config, name, None)
    return config


def config_class(method: Any) -> Any:
    """Returns PEFT's config class for a ``peft_type``."""
    kind = str(to_primitives(method))
    known: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    cls = known.get(kind)
    if cls is None:
        raise ConfigError(
            f"peft_type={method!r} is not a method of PEFT. Those supported here: "
            f"{', '.join(METHODS)}."
        )
    if kind not in METHODS:
        raise not_injected(cls.__name__, kind)
    return cls


def config_to_dict(config: PeftConfig) -> dict[str, Any]:
    """Returns the fields of a PEFT config that PEFT itself would write to a file, as primitives."""
    fields: dict[str, Any] = to_primitives(config.to_dict())
    return fields


def config_from_dict(fields: Mapping[str, Any]) -> PeftConfig:
    """Returns the PEFT config that :func:`config_to_dict` wrote, or another version's.

    Fields that this version of PEFT does not know are left out.
    """
    cls = type(_from_mapping({"peft_type": fields["peft_type"]}))
    known = {field.name for field in dataclasses.fields(cls)}
    return as_peft_config({key: value for key, value in fields.items() if key in known})


def config_differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns the fields in which two configs differ, and which decide what the tensors mean."""
    fields = METHODS[to_primitives(mine["peft_type"])].decisive_fields
    if fields is None:
        fields = tuple(key for key in mine if key in theirs and key not in _NOT_DECISIVE)
    return [
        key
        for key in fields
        if "dropout" not in key and _comparable(mine.get(key)) != _comparable(theirs.get(key))
    ]


def _comparable(value: Any) -> Any:
    value = to_primitives(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        # Names have no order.
        return sorted(value)
    return value
