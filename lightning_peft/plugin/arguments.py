"""The arguments that strategies and callbacks share: one signature, one home for each default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from lightning_peft import engine
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.lifecycle import InjectionSettings


class LoRAArguments:
    """Mixin whose constructor is the LoRA signature.

    Args:
        peft_config: A ready ``peft`` config of any method that can be injected, or its fields with
            a ``peft_type``; the LoRA arguments below must then stay at their defaults.
        r: Rank of the adapters.
        lora_alpha: Numerator of the scaling ``lora_alpha / r``; ``None`` means ``2 * r``.
        lora_dropout: Dropout probability in front of the adapters.
        target_modules: Names of layers, a regular expression, or ``"all-linear"``. By default all
            linear layers of the adapted parts except output heads. A name that matches nothing is
            an error.
        exclude_modules: Names or a regular expression never to adapt.
        modules_to_save: Modules trained in full and stored with the adapter.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732).
        use_dora: Weight-decomposed LoRA (arXiv 2402.09353), through PEFT's own layers.
        init_lora_weights: PEFT's initialisations: ``True``, ``"gaussian"``, ``"pissa"``,
            ``"olora"``, ``"loftq"``, ...
        rank_pattern: Rank by layer name or pattern, where it differs from ``r``.
        alpha_pattern: ``lora_alpha`` by layer name or pattern.
        layers_to_transform: Indices of the blocks to adapt.
        bias: Which biases train besides: ``"none"``, ``"all"`` or ``"lora_only"``.
        adapt: Names of the submodules that get adapters. By default the pretrained ones
            (transformers and timm models), and where there are none the whole module.
        optimizer: A bitsandbytes optimizer by transformers' name, such as ``"paged_adamw_8bit"``
            or ``"adamw_8bit"``, that takes the place of those that ``configure_optimizers``
            returns, with their parameter groups, hyperparameters and LR schedulers. ``"auto"`` is
            paged 32-bit AdamW for torch's own Adam and AdamW and leaves others as they are;
            ``None`` leaves all.
        gradient_checkpointing: Keep only the inputs of repeated blocks for the backward pass, and
            compute the rest again (arXiv 1604.06174): the same numbers, less memory, more time.
            ``"auto"`` where the model has such blocks; ``True`` raises where it has none. An amount
            such as ``"2GB"`` or ``"512MiB"``, or a share such as ``0.5``, is what the blocks may
            keep: what costs most time for its bytes is kept first.
        print_summary: Print what is adapted when training starts.
        verify: What is checked by itself when training starts: ``"cheap"`` looks at the structure
            and at the gradients of the first step, ``"full"`` also runs
            :func:`lightning_peft.verify` on the first batch before that step.
        ddp_kwargs: For the strategies, further arguments of Lightning's ``DDPStrategy``, such as
            ``{"find_unused_parameters": True}``.

    Raises:
        ConfigError: If the arguments cannot work; all problems at once.
    """

    _take: Callable[[dict[str, Any]], None]

    def __init__(
        self,
        peft_config: Any | None = None,
        *,
        r: int = 16,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, int] | None = None,
        layers_to_transform: int | list[int] | None = None,
        bias: Literal["none", "all", "lora_only"] = "none",
        adapt: str | list[str] | None = None,
        optimizer: str | None = None,
        gradient_checkpointing: bool | Literal["auto"] | float | str = False,
        print_summary: bool = True,
        verify: Literal["cheap", "full", "off"] = "cheap",
        ddp_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._take(locals())


class QLoRAArguments:
    """Mixin whose constructor is the QLoRA signature.

    Args:
        peft_config: A ready ``peft`` config of any method that can be injected, or its fields with
            a ``peft_type``; the LoRA arguments below must then stay at their defaults.
        r: Rank of the adapters.
        lora_alpha: Numerator of the scaling ``lora_alpha / r``; ``None`` means ``2 * r``.
        lora_dropout: Dropout probability in front of the adapters.
        target_modules: Names of layers, a regular expression, or ``"all-linear"`` (the default).
        exclude_modules: Names or a regular expression never to adapt.
        modules_to_save: Modules trained in full and stored with the adapter; never quantized.
        use_rslora: Scale by ``lora_alpha / sqrt(r)``.
        use_dora: Weight-decomposed LoRA, through PEFT's own layers.
        init_lora_weights: PEFT's initialisations.
        rank_pattern: Rank by layer name or pattern, where it differs from ``r``.
        alpha_pattern: ``lora_alpha`` by layer name or pattern.
        layers_to_transform: Indices of the blocks to adapt.
        bias: Which biases train besides.
        quantization_config: A ready ``transformers.BitsAndBytesConfig``, or its fields; the five
            arguments below must then stay at their defaults.
        load_in_8bit: Eight bits per weight (LLM.int8, arXiv 2208.07339) instead of four.
        bnb_4bit_quant_type: ``"nf4"`` or ``"fp4"``.
        bnb_4bit_use_double_quant: Quantize the block constants too: 4.127 bits per weight instead
            of 4.5.
        bnb_4bit_compute_dtype: Dtype of the products with quantized weights; ``None`` follows the
            activations, and so the Trainer's ``precision``.
        cache_quantized_base: Keep the codes of a base that ``from_pretrained`` loads in
            ``configure_model`` on disk, about half a byte for each weight, and take them from
            there when the same files are loaded again. ``lightning-peft cache`` lists and clears.
        adapt: Names of the submodules that get adapters; by default the pretrained ones.
        optimizer: A bitsandbytes optimizer by transformers' name, such as ``"paged_adamw_8bit"``
            or ``"adamw_8bit"``, that takes the place of those that ``configure_optimizers``
            returns, with their parameter groups, hyperparameters and LR schedulers. ``"auto"`` is
            paged 32-bit AdamW for torch's own Adam and AdamW and leaves others as they are;
            ``None`` leaves all.
        gradient_checkpointing: Keep only the inputs of repeated blocks for the backward pass, and
            compute the rest again (arXiv 1604.06174): the same numbers, less memory, more time.
            ``"auto"`` where the model has such blocks; ``True`` raises where it has none. An amount
            such as ``"2GB"`` or ``"512MiB"``, or a share such as ``0.5``, is what the blocks may
            keep: what costs most time for its bytes is kept first.
        print_summary: Print what is adapted and quantized when training starts.
        verify: What is checked when training starts: ``"cheap"``, ``"full"`` or ``"off"``.
        ddp_kwargs: For the strategies, further arguments of Lightning's ``DDPStrategy``.

    Raises:
        ConfigError: If the arguments cannot work; all problems at once.
    """

    _take: Callable[[dict[str, Any]], None]

    def __init__(
        self,
        peft_config: Any | None = None,
        *,
        r: int = 16,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, int] | None = None,
        layers_to_transform: int | list[int] | None = None,
        bias: Literal["none", "all", "lora_only"] = "none",
        quantization_config: Any | None = None,
        load_in_8bit: bool = False,
        bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4",
        bnb_4bit_use_double_quant: bool = True,
        bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        cache_quantized_base: bool = True,
        adapt: str | list[str] | None = None,
        optimizer: str | None = "auto",
        gradient_checkpointing: bool | Literal["auto"] | float | str = "auto",
        print_summary: bool = True,
        verify: Literal["cheap", "full", "off"] = "cheap",
        ddp_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._take(locals())


_LORA = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
    "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "bias",
)  # fmt: skip
_QUANTIZATION = (
    "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
)  # fmt: skip


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments out of a constructor's ``locals()``."""
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__")}


def injection_from(arguments: Mapping[str, Any]) -> InjectionSettings:
    """Returns what to inject; the QLoRA signature means that the base is quantized.

    Raises:
        ConfigError: If a ready config and its fields are both given, or the values cannot work.
    """
    quantized = "load_in_8bit" in arguments
    signature = inspect.signature((QLoRAArguments if quantized else LoRAArguments).__init__)
    changed = {n for n, v in arguments.items() if signature.parameters[n].default != v}
    _not_both("peft_config", arguments["peft_config"], changed & set(_LORA))
    lora = {name: arguments[name] for name in _LORA}
    config = (
        engine.lora_config(**lora)
        if arguments["peft_config"] is None
        else engine.as_peft_config(arguments["peft_config"])
    )
    quantization = None
    if quantized:
        _not_both(
            "quantization_config", arguments["quantization_config"], changed & set(_QUANTIZATION)
        )
        quantization = engine.quantization_config(
            arguments["quantization_config"], **{name: arguments[name] for name in _QUANTIZATION}
        )
    adapt = arguments["adapt"]
    explicitly_set = bool(changed & {*_LORA, "peft_config"})
    engine.check_optimizer_name(arguments["optimizer"])
    engine.read_budget(arguments["gradient_checkpointing"])
    return InjectionSettings(
        config,
        quantization,
        [adapt] if isinstance(adapt, str) else adapt,
        explicitly_set=explicitly_set,
        optimizer=arguments["optimizer"],
        gradient_checkpointing=arguments["gradient_checkpointing"],
        cache_quantized_base=bool(arguments.get("cache_quantized_base", False)),
    )


def _not_both(name: str, config: Any, fields: set[str]) -> None:
    if config is not None and fields:
        raise ConfigError(
            f"Both `{name}` and {sorted(fields)} were given. A ready config is taken as it is: "
            "put these values into it."
        )
