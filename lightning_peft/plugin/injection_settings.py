"""Validated configs from the arguments of strategies and callbacks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from lightning_peft import engine
from lightning_peft.arguments import LoRAArguments, LoRAFields, QLoRAArguments
from lightning_peft.errors import ConfigError

_LORA = {field.name for field in fields(LoRAFields)}
_QUANTIZATION = {
    *("load_in_8bit", "bnb_4bit_quant_type"),
    *("bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"),
}


@dataclass(frozen=True)
class InjectionSettings:
    """What a strategy or callback injects, validated.

    Attributes:
        peft_config: PEFT's config.
        quantization_config: transformers' config, or ``None`` for a base that stays as it is.
        adapt: Names of the submodules to adapt, or ``None``.
        adapters_configured: Whether the user set any argument of the adapters.
        optimizer: Name of the optimizer that replaces the user's, or ``None``.
        gradient_checkpointing: Whether to keep only the inputs of blocks for the backward pass, or
            how much the blocks may keep.
        lora_plus_lr_ratio: How much faster ``B`` trains than ``A``, or ``None``.
        cache_quantized_base: Whether the cache of quantized bases is used.
    """

    peft_config: Any
    quantization_config: Any
    adapt: list[str] | None
    adapters_configured: bool = True
    optimizer: str | None = None
    gradient_checkpointing: bool | float | str = "auto"
    lora_plus_lr_ratio: float | None = None
    cache_quantized_base: bool = False


def injection_settings(arguments: LoRAArguments) -> InjectionSettings:
    """Validates arguments; QLoRA's mean that the base is quantized."""
    changed = arguments.explicitly_set()
    _check_exclusive("peft_config", arguments.peft_config, changed & _LORA)
    peft_config = (
        engine.lora_config(arguments)
        if arguments.peft_config is None
        else engine.as_peft_config(arguments.peft_config)
    )
    quantization, cached = None, False
    if isinstance(arguments, QLoRAArguments):
        ready, cached = arguments.quantization_config, arguments.cache_quantized_base
        _check_exclusive("quantization_config", ready, changed & _QUANTIZATION)
        quantization = engine.quantization_config(
            ready,
            load_in_8bit=arguments.load_in_8bit,
            bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=arguments.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=arguments.bnb_4bit_compute_dtype,
        )
    engine.check_optimizer_name(arguments.optimizer)
    _check_ratio(arguments.lora_plus_lr_ratio)
    engine.read_budget(arguments.gradient_checkpointing)
    adapt = arguments.adapt
    return InjectionSettings(
        peft_config,
        quantization,
        [adapt] if isinstance(adapt, str) else adapt,
        adapters_configured=bool(changed & {*_LORA, "peft_config"}),
        optimizer=arguments.optimizer,
        gradient_checkpointing=arguments.gradient_checkpointing,
        lora_plus_lr_ratio=arguments.lora_plus_lr_ratio,
        cache_quantized_base=cached,
    )


def _check_ratio(ratio: float | None) -> None:
    if ratio is not None and not (not isinstance(ratio, bool) and 0 < ratio < math.inf):
        raise ConfigError(
            f"lora_plus_lr_ratio={ratio!r}: the learning rate of B over that of A, a positive "
            "number; its authors recommend 16."
        )


def _check_exclusive(name: str, config: Any, fields: set[str]) -> None:
    if config is not None and fields:
        raise ConfigError(
            f"Both `{name}` and {sorted(fields)} were given. A ready config is taken as it is: "
            "put these values into it."
        )
