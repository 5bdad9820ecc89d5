"""Supported settings of PEFT's ``LoraConfig``."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig

from lightning_peft.compat.peft import CUSTOM_MODULES_FIELD, get_pattern_key
from lightning_peft.engine.layers.expert_weights import parameter_name
from lightning_peft.errors import UnsupportedError

# Inits that write into the base weight: what is trained is then not the base that was loaded.
_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Those of them that only take the product of the first factors off the base.
_SUBTRACTING_INITS = ("pissa", "olora", "corda", "lora_ga")
# Those that are made from batches.
_DATA_INITS = ("eva", "corda", "lora_ga")
# PEFT's own defaults.
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}
INITS = (
    *("gaussian", "orthogonal", "pissa", "pissa_niter_<number>", "olora", "loftq"),
    *_DATA_INITS,
)
# It freezes one of the factors, in a variant of PEFT's layers.
REFUSED_INITS = ("mica",)

# Extensions of LoRA that go through PEFT's model class or change the model around the layers.
REFUSED_FIELDS = (
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


def lora_problems(fields: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each field that cannot work."""
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
    if targets is not None and not targets and not fields["target_parameters"]:
        problems.append("target_modules is empty: name at least one layer, or 'all-linear'")
    if fields["layers_to_transform"] is not None and is_pattern(targets):
        problems.append(
            "layers_to_transform with a regular expression in target_modules: put the indices "
            "into the expression"
        )
    problems += _token_problems(fields["trainable_token_indices"])
    return problems + _init_problems(fields) + _pattern_problems(fields)


def _entries(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {f"{name}[{key!r}]": value for key, value in (fields[name] or {}).items()}


def _init_problems(fields: Mapping[str, Any]) -> list[str]:
    init = fields["init_lora_weights"]
    if isinstance(init, bool) or init is None:
        return []
    known = "|".join((*INITS[:3], r"pissa_niter_\d+", *INITS[4:]))
    if init in REFUSED_INITS:
        return [
            f"init_lora_weights={init!r}: PEFT freezes B, in a variant of its layers that "
            f"adapters in place do not have; use one of {', '.join(INITS)}"
        ]
    if not re.fullmatch(known, str(init)):
        return [f"init_lora_weights={init!r}: True, False or one of {', '.join(INITS)}"]
    if init == "corda":
        given = fields.get("corda_config")
        settings = given if isinstance(given, Mapping) else vars(given or object)
        names = ("cache_file", "covariance_file", "use_float16_for_covariance")
        given = [name for name in names if settings.get(name)]
        return [
            f"corda_config with {', '.join(given)}: leave it out, since the covariances are made "
            "from the training data, in float32"
            for _ in given[:1]
        ]
    return _loftq_problems(fields) if init == "loftq" else []


def _loftq_problems(fields: Mapping[str, Any]) -> list[str]:
    settings = loftq_settings(fields) or {}
    if settings["loftq_bits"] in (4, 8) and settings["loftq_iter"] >= 1:
        return []
    return [f"loftq_config={settings}: 4 or 8 bits, and one iteration or more"]


def _token_problems(value: Any) -> list[str]:
    if value is None:
        return []
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    right = lists and all(
        isinstance(rows, (list, tuple))
        and rows
        and all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in rows)
        and len(set(rows)) == len(rows)
        for rows in lists
    )
    if right:
        return []
    return [
        f"trainable_token_indices={value!r}: a list of different token numbers, or one for each "
        "name of an embedding, such as {'embed_tokens': [32000, 32001]}"
    ]


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(value) and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        return False


def is_pattern(target_modules: Any) -> bool:
    """Whether ``target_modules`` is a regular expression."""
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


def with_lower_init(config: LoraConfig) -> LoraConfig:
    """Returns ``config`` with an initialisation such as ``"Gaussian"`` in PEFT's own spelling."""
    init: Any = config.init_lora_weights
    if not isinstance(init, str) or init == init.lower():
        return config
    spelled = copy.copy(config)
    spelled.init_lora_weights = init.lower()  # type: ignore[assignment]
    return spelled


def refuse_extensions(config: LoraConfig) -> None:
    """Refuses extensions of LoRA that do not work on a plain module."""
    used = [name for name in REFUSED_FIELDS if getattr(config, name, None)]
    if used:
        raise UnsupportedError(
            f"LoraConfig with {', '.join(x.lstrip('_') for x in used)}: it changes the model "
            "around the adapted layers, or works through PEFT's model class or classes of your own "
            "only, so checkpoints of a plain module would not hold all of it. Leave it out, or use "
            "peft.get_peft_model in your LightningModule."
        )


def rank_of(config: Any, name: str) -> int:
    """Returns the rank of an adapter on the layer ``name``, with ``rank_pattern`` applied."""
    key = get_pattern_key(config.rank_pattern, parameter_name(name))
    rank: int = config.rank_pattern.get(key, config.r)
    return rank


def alpha_of(config: Any, name: str) -> float:
    """Returns ``lora_alpha`` of an adapter on the layer ``name``."""
    key = get_pattern_key(config.alpha_pattern, parameter_name(name))
    alpha: float = config.alpha_pattern.get(key, config.lora_alpha)
    return alpha


def needs_data(config: PeftConfig | Mapping[str, Any]) -> bool:
    """Whether the initialisation is made from batches."""
    return _initialization(config) in _DATA_INITS


def changes_base(config: PeftConfig | Mapping[str, Any]) -> bool:
    """Whether the initialisation in a config, or in its fields, writes into the base weights."""
    return _initialization(config).startswith(_CHANGING_INITS)


def subtracts_from_base(config: PeftConfig) -> bool:
    """Whether the initialisation takes ``s B A`` of the first factors off the base."""
    return _initialization(config).startswith(_SUBTRACTING_INITS)


def loftq_settings(config: PeftConfig | Mapping[str, Any]) -> dict[str, int] | None:
    """PEFT's ``loftq_config`` where a config requests LoftQ, else ``None``."""
    if _initialization(config) != "loftq":
        return None
    fields: Any = config if isinstance(config, Mapping) else vars(config)
    given = fields.get("loftq_config") or {}
    settings: dict[str, int] = dict(given if isinstance(given, Mapping) else vars(given))
    return {**LOFTQ, **settings}


def quantizes_another_base(config: Mapping[str, Any]) -> bool:
    """Whether an adapter on a quantized base is for codes of other weights than the loaded ones.

    LoftQ of one iteration quantizes the loaded ones, and only its factors differ.
    """
    settings = loftq_settings(config)
    return changes_base(config) and (settings is None or settings["loftq_iter"] > 1)


def _initialization(config: PeftConfig | Mapping[str, Any]) -> str:
    fields = config if isinstance(config, Mapping) else vars(config)
    return str(fields.get("init_lora_weights")).lower()
