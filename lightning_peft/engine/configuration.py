"""From the field's words (``r``, ``lora_alpha``, ``target_modules``, ...) to PEFT's configs.

The configs themselves, their validation and their file format belong to PEFT; this module only
fills them, checks what they let through, and turns them into plain JSON values.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_config

from lightning_peft.arguments import LoRAFields
from lightning_peft.compat.peft import CUSTOM_MODULES_FIELD
from lightning_peft.engine.methods import METHODS, refuse_method
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.errors import ConfigError, UnsupportedError, itemize

# Inits that write into the base weight: what is trained is then not the base that was loaded.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Those of them that only take the product of the first factors off the base.
_SUBTRACTING_INITS = ("pissa", "olora")
_INITS = ("gaussian", "orthogonal", "pissa", "pissa_niter_<number>", "olora", "loftq")
# These need data, or a preprocessed model, on every start: PEFT keeps that to its own model class.
_REFUSED_INITS = ("eva", "mica", "corda", "lora_ga")

# Extensions of LoRA that go through PEFT's model class or change the model around the layers.
_REFUSED_FIELDS = (
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "use_qalora",
    "ensure_weight_tying",
    CUSTOM_MODULES_FIELD,
)

# Fields that decide what the tensors mean. Others (dropout, the way targets were written) may
# change between runs.
DECISIVE_FIELDS = (
    "peft_type",
    "r",
    "lora_alpha",
    "alpha",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "feedforward_modules",
    "bias",
    "modules_to_save",
    "init_lora_weights",
)


# Of other methods than LoRA: where adapters go, how they are read, and what they started from.
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
)


def lora_config(arguments: LoRAFields | None = None) -> LoraConfig:
    """Fills a ``peft.LoraConfig``; without arguments, with the defaults of this package.

    Raises:
        ConfigError: For every value that cannot work, all of them at once.
    """
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
        fields["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's own defaults
    problems = _lora_problems(fields)
    if problems:
        raise ConfigError("These LoRA settings cannot work:" + itemize(problems))
    config: LoraConfig = _make_config(LoraConfig, fields)
    _check_saved_modules(config)
    return config


def _lora_problems(fields: Mapping[str, Any]) -> list[str]:
    ranks = {"r": fields["r"]} | _entries(fields, "rank_pattern")
    alphas = {"lora_alpha": fields["lora_alpha"]} | _entries(fields, "alpha_pattern")
    dropout, bias = fields["lora_dropout"], fields["bias"]
    problems = [
        f"{name}={value!r}: the rank is a positive integer"
        for name, value in ranks.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    problems += [
        f"{name}={value!r}: a positive number; a scaling of zero or less trains nothing"
        for name, value in alphas.items()
        if not _is_number(value) or not 0 < value < math.inf
    ]
    if not _is_number(dropout) or not 0.0 <= dropout < 1.0:
        problems.append(f"lora_dropout={dropout!r}: a probability in [0, 1)")
    if bias not in ("none", "all", "lora_only"):
        problems.append(f"bias={bias!r}: one of 'none', 'all', 'lora_only'")
    targets = fields["target_modules"]
    if targets is not None and not targets:
        problems.append("target_modules is empty: name at least one layer, or 'all-linear'")
    if fields["layers_to_transform"] is not None and _is_pattern(targets):
        problems.append(
            "layers_to_transform with a regular expression in target_modules: put the indices "
            "into the expression"
        )
    return problems + _init_problems(fields) + _pattern_problems(fields)


def _entries(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {f"{name}[{key!r}]": value for key, value in (fields[name] or {}).items()}


def _init_problems(fields: Mapping[str, Any]) -> list[str]:
    init = fields["init_lora_weights"]
    if isinstance(init, bool) or init is None:
        return []
    known = "|".join((*_INITS[:3], r"pissa_niter_\d+", *_INITS[4:]))
    if init in _REFUSED_INITS:
        return [
            f"init_lora_weights={init!r}: PEFT prepares it from data with its own model class, "
            f"which a module that is adapted in place does not have; use one of {', '.join(_INITS)}"
        ]
    if not re.fullmatch(known, str(init)):
        return [f"init_lora_weights={init!r}: True, False or one of {', '.join(_INITS)}"]
    scalings = {**_entries(fields, "alpha_pattern"), **_entries(fields, "rank_pattern")}
    if init == "loftq" and (scalings or fields["lora_alpha"] != fields["r"]):
        return [
            f"init_lora_weights='loftq' with lora_alpha={fields['lora_alpha']!r}: PEFT computes "
            "LoftQ for a scaling of one, so set lora_alpha to r and leave the patterns out"
        ]
    return []


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(value) and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        return False


def _is_pattern(target_modules: Any) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() != "all-linear"


def _pattern_problems(fields: Mapping[str, Any]) -> list[str]:
    written = [(name, fields[name]) for name in ("target_modules", "exclude_modules")]
    written = [(name, value) for name, value in written if isinstance(value, str)]
    written += [(n, key) for n in ("rank_pattern", "alpha_pattern") for key in fields[n] or {}]
    problems = []
    for name, pattern in written:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{name}: {pattern!r} is not a regular expression ({error})")
    return problems


def _make_config(cls: Any, fields: Mapping[str, Any]) -> Any:
    """Returns ``cls(**fields)``, also for indices of blocks with ``"all-linear"``.

    PEFT refuses the pair when a config is made, since it would ignore the indices. Here they are
    resolved together, with the names of the lists that they count in.
    """
    indices = fields.get("layers_to_transform")
    later: dict[str, Any] = {}
    if indices is not None and not _is_pattern(fields.get("target_modules")):
        named = ("layers_to_transform", "layers_pattern")
        later = {name: fields[name] for name in named if name in fields}
        fields = {**fields, **dict.fromkeys(later)}
    try:
        config = cls(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{cls.__name__} does not accept these settings: {error}") from error
    for name, value in later.items():
        setattr(config, name, value)
    return config


def as_peft_config(config: PeftConfig | Mapping[str, Any]) -> PeftConfig:
    """Returns ``config`` itself, or the config that a mapping with a ``peft_type`` describes.

    Raises:
        ConfigError: If the mapping names no known method or holds an argument it does not know.
        UnsupportedError: If the method cannot be injected into a module.
    """
    if isinstance(config, Mapping):
        config = _from_mapping(config)
    refuse_method(config)
    _check_saved_modules(config)
    if isinstance(config, LoraConfig):
        _refuse_extensions(config)
        config = _with_lower_init(config)
        problems = _lora_problems(vars(config))
        if problems:
            raise ConfigError("These LoRA settings cannot work:" + itemize(problems))
    return config


def _check_saved_modules(config: PeftConfig) -> None:
    saved: Any = getattr(config, "modules_to_save", None)
    if saved is not None and (isinstance(saved, str) or not all(map(_is_name, saved))):
        raise ConfigError(
            f"modules_to_save={saved!r}: a list of names of submodules, such as ['classifier']."
        )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _with_lower_init(config: LoraConfig) -> LoraConfig:
    """Returns ``config`` with an initialisation such as ``"Gaussian"`` in PEFT's own spelling."""
    init: Any = config.init_lora_weights
    if not isinstance(init, str) or init == init.lower():
        return config
    spelled = copy.copy(config)
    spelled.init_lora_weights = init.lower()  # type: ignore[assignment]
    return spelled


def _refuse_extensions(config: LoraConfig) -> None:
    used = [name for name in _REFUSED_FIELDS if getattr(config, name, None)]
    if used:
        raise UnsupportedError(
            f"LoraConfig with {', '.join(x.lstrip('_') for x in used)}: it changes the model "
            "around the adapted layers, or works through PEFT's model class or classes of your own "
            "only, so checkpoints of a plain module would not hold all of it. Leave it out, or use "
            "peft.get_peft_model in your LightningModule."
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
    config: PeftConfig = _make_config(cls, fields)
    return config


def config_class(method: Any) -> Any:
    """Returns PEFT's config class for a ``peft_type``.

    Raises:
        ConfigError: If there is none.
        UnsupportedError: If the method cannot be injected into a module.
    """
    try:
        config = get_peft_config({"peft_type": to_primitives(method)})
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"peft_type={method!r} is not a method of PEFT. Those supported here: "
            f"{', '.join(METHODS)}."
        ) from error
    if str(to_primitives(config.peft_type)) not in METHODS:
        refuse_method(config)
    return type(config)


def config_to_dict(config: PeftConfig) -> dict[str, Any]:
    """Returns the fields of a PEFT config that PEFT itself would write to a file, as primitives."""
    fields: dict[str, Any] = to_primitives(config.to_dict())
    return fields


def config_from_dict(fields: Mapping[str, Any]) -> PeftConfig:
    """Returns the PEFT config that :func:`config_to_dict` wrote, or another version's.

    Fields that this version of PEFT does not know are left out.

    Raises:
        ConfigError: If the fields contradict each other, or name no method of PEFT.
        UnsupportedError: If the method cannot be injected into a module.
    """
    cls = type(_from_mapping({"peft_type": fields["peft_type"]}))
    known = {field.name for field in dataclasses.fields(cls)}
    return as_peft_config({key: value for key, value in fields.items() if key in known})


def config_differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Returns the decisive fields in which two configs differ.

    For LoRA these are :data:`DECISIVE_FIELDS`; for other methods also all that both know, except
    what may change between runs.
    """
    fields = list(DECISIVE_FIELDS)
    if to_primitives(mine.get("peft_type")) != "LORA":
        fields += [key for key in mine if key in theirs and key not in (*fields, *_NOT_DECISIVE)]
    return [
        key
        for key in fields
        if "dropout" not in key and _comparable(mine.get(key)) != _comparable(theirs.get(key))
    ]


def _comparable(value: Any) -> Any:
    value = to_primitives(value)
    # Sets of names have no order, and the first values do not matter.
    return sorted(value, key=repr) if isinstance(value, list) else value


def changes_base(config: PeftConfig) -> bool:
    """Whether the initialisation writes into the base weights."""
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(BASE_CHANGING_INITS)


def subtracts_from_base(config: PeftConfig) -> bool:
    """Whether the initialisation takes ``s B A`` of the first factors off the base."""
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(_SUBTRACTING_INITS)
