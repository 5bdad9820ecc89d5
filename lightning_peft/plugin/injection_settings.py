"""Validated configs from the arguments of strategies, callbacks and ``adapter_defaults()``."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

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


if TYPE_CHECKING:
    from lightning_peft.arguments import LoRAArguments

HOOK = "adapter_defaults"
# Attribute of a submodule that takes any dtype: what of it trains stays float32.
KEPT_IN_FLOAT32 = "kept_in_float32"


@dataclass(frozen=True)
class AdapterDefaults:
    """Submodules of the pretrained model that a module treats in another way than the rest.

    Attributes:
        left: Names of submodules that get no adapter and stay as precise as they are, unless
            ``target_modules`` names them.
        saved: Names of submodules that are trained in full, as those of ``modules_to_save``.
        dense: Names of further submodules that are not quantized.
        inside: Names of all modules in ``left``. Where they are known, a pattern in
            ``target_modules`` names a part only if it matches one of them.
    """

    left: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()


def with_adapter_defaults(
    settings: InjectionSettings, arguments: LoRAArguments, module: Any
) -> InjectionSettings:
    """Returns settings with what ``module`` says by a method ``adapter_defaults``.

    It is not asked where the user names the parts to adapt; a ready config is taken as it is.
    """
    hook = getattr(module, HOOK, None)
    if hook is None or settings.adapt is not None:
        return settings
    defaults: AdapterDefaults = hook()
    wanted = getattr(settings.peft_config, "target_modules", None)
    left = [name for name in defaults.left if not names_part(wanted, name, defaults.inside)]
    peft_config, quantization = settings.peft_config, settings.quantization_config
    if arguments.peft_config is None:
        peft_config = copy.copy(peft_config)
        peft_config.exclude_modules = _excluded(peft_config.exclude_modules, left)
        saved = [*(peft_config.modules_to_save or []), *defaults.saved]
        peft_config.modules_to_save = list(dict.fromkeys(saved)) or None
    if quantization is not None and getattr(arguments, "quantization_config", None) is None:
        backend = engine.backend_for(quantization)
        dense = [*backend.skip_modules(quantization), *left, *defaults.dense]
        quantization = copy.copy(quantization)
        setattr(quantization, backend.skip_argument, list(dict.fromkeys(dense)) or None)
    return replace(settings, peft_config=peft_config, quantization_config=quantization)


def names_part(wanted: str | Iterable[str] | None, part: str, inside: Iterable[str] = ()) -> bool:
    """Whether ``target_modules`` names a submodule.

    It then has a step of its name, such as its own, and matches a module of it: a pattern such as
    ``(?!.*visual).*q_proj`` has the step to leave it out. Without ``inside``, the step decides.
    """
    steps = "|".join(re.escape(step) for step in part.split(".") if step != "model")
    word = re.compile(rf"(?<![A-Za-z0-9_])(?:{steps})(?![A-Za-z0-9_])")
    modules = [name for name in inside if f"{name}.".startswith(f"{part}.")]
    if isinstance(wanted, str):
        matched = not modules or any(re.fullmatch(wanted, name) for name in modules)
        return matched and word.search(wanted) is not None
    return any(word.search(entry) for entry in wanted or ())


def _excluded(given: str | Iterable[str] | None, left: list[str]) -> Any:
    """Returns ``exclude_modules`` with what is given and what is left."""
    if not left:
        return given
    patterns = [rf"(.*\.)?{re.escape(name)}(\..*)?" for name in left]
    if isinstance(given, str):
        return "|".join([f"(?:{given})", *patterns])
    # As PEFT reads a list: the last steps of a name.
    return "|".join([*(rf"(.*\.)?{re.escape(name)}" for name in given or ()), *patterns])
