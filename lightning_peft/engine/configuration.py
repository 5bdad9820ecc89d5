"""From the field's words (``r``, ``lora_alpha``, ``bnb_4bit_*``) to PEFT's and transformers' configs.

The configs themselves, their validation and their file format belong to PEFT and transformers;
this module only fills them, checks what they let through, and turns them into plain JSON values.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_config
from transformers import BitsAndBytesConfig

from lightning_peft.errors import ConfigError, UnsupportedError, itemize

Patterns = dict[str, int]

# Inits that write into the base weight: what is trained is then not the base that was loaded.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_config(
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
    rank_pattern: Patterns | None = None,
    alpha_pattern: Patterns | None = None,
    layers_to_transform: int | list[int] | None = None,
    bias: str = "none",
) -> LoraConfig:
    """Fills a ``peft.LoraConfig``.

    Args:
        r: Rank of ``A`` and ``B``.
        lora_alpha: Numerator of the scaling; ``None`` means ``2 * r``, the common heuristic.
        lora_dropout: Probability of dropout in front of ``A``.
        target_modules: Names, a regular expression, or ``"all-linear"`` (the default).
        exclude_modules: Names or a regular expression never to adapt.
        modules_to_save: Modules that are trained in full and stored with the adapter.
        use_rslora: Scale by ``alpha / sqrt(r)``.
        use_dora: Weight-decomposed LoRA.
        init_lora_weights: PEFT's initialisations.
        rank_pattern: Rank by name or pattern, where it differs from ``r``.
        alpha_pattern: ``lora_alpha`` by name or pattern.
        layers_to_transform: Indices of the blocks to adapt.
        bias: ``"none"``, ``"all"`` or ``"lora_only"``.

    Raises:
        ConfigError: For every value that cannot work, all of them at once.
    """
    problems = []
    if not isinstance(r, int) or r < 1:
        problems.append(f"r={r!r}: the rank is a positive integer")
    if lora_alpha is not None and lora_alpha <= 0:
        problems.append(f"lora_alpha={lora_alpha!r}: a scaling of zero or less trains nothing")
    if not 0.0 <= lora_dropout < 1.0:
        problems.append(f"lora_dropout={lora_dropout!r}: a probability in [0, 1)")
    if bias not in ("none", "all", "lora_only"):
        problems.append(f"bias={bias!r}: one of 'none', 'all', 'lora_only'")
    for name, rank in (rank_pattern or {}).items():
        if rank < 1:
            problems.append(f"rank_pattern[{name!r}]={rank!r}: the rank is a positive integer")
    if isinstance(target_modules, list) and not target_modules:
        problems.append("target_modules=[]: names at least one layer; 'all-linear' takes all")
    if problems:
        raise ConfigError("These LoRA settings cannot work:" + itemize(problems))
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
        target_modules=target_modules or "all-linear",
        exclude_modules=exclude_modules,
        modules_to_save=modules_to_save,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=init_lora_weights,  # type: ignore[arg-type]
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        layers_to_transform=layers_to_transform,
        bias=bias,  # type: ignore[arg-type]
    )


def as_peft_config(config: PeftConfig | Mapping[str, Any]) -> PeftConfig:
    """Returns ``config`` itself, or the config that a mapping with a ``peft_type`` describes.

    Raises:
        ConfigError: If the mapping names no known method or holds an argument it does not know.
        UnsupportedError: If the method cannot be injected into a module.
    """
    if not isinstance(config, PeftConfig):
        if "peft_type" not in config:
            raise ConfigError(
                f"peft_config={dict(config)!r} does not say which method it is for. "
                "Add `peft_type`, for example `peft_type: LORA`."
            )
        try:
            config = get_peft_config(dict(config))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"peft_config={dict(config)!r} is no PEFT config: {error}") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UnsupportedError(
            f"{type(config).__name__} adds virtual tokens in front of a language model's input; it "
            "is not injected into layers, so no strategy can add it to an arbitrary module. Wrap "
            "the model with peft.get_peft_model in your LightningModule and use Lightning's own "
            "strategies."
        )
    if config.peft_type == "ADALORA":
        raise UnsupportedError(
            "AdaLoRA reallocates ranks during training through its own model wrapper; injected "
            "into a module its budget would never move and it would be plain SVD-LoRA in silence. "
            "Use LoRA with `rank_pattern`, or peft.get_peft_model in your LightningModule."
        )
    return config


def quantization_config(
    config: BitsAndBytesConfig | Mapping[str, Any] | None = None,
    *,
    load_in_4bit: bool = True,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    bnb_4bit_use_double_quant: bool = True,
    bnb_4bit_compute_dtype: str | None = None,
) -> BitsAndBytesConfig:
    """Fills, or checks, a ``transformers.BitsAndBytesConfig``.

    Args:
        config: A ready config, or its fields; the other arguments are then not looked at.
        load_in_4bit: Four bits per weight.
        load_in_8bit: Eight bits per weight instead.
        bnb_4bit_quant_type: ``"nf4"`` or ``"fp4"``.
        bnb_4bit_use_double_quant: Quantize the block constants too (4.127 bits per weight
            instead of 4.5).
        bnb_4bit_compute_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None`` follows
            the activations (and so the Trainer's ``precision``).

    Raises:
        ConfigError: If the values contradict each other.
    """
    if isinstance(config, Mapping):
        config = BitsAndBytesConfig(**config)
    if config is None:
        if load_in_8bit and bnb_4bit_quant_type != "nf4":
            raise ConfigError(
                f"load_in_8bit=True with bnb_4bit_quant_type={bnb_4bit_quant_type!r}: 8-bit "
                "weights have no 4-bit type. Drop one of the two."
            )
        if bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ConfigError(f"bnb_4bit_quant_type={bnb_4bit_quant_type!r}: 'nf4' or 'fp4'.")
        dtype = getattr(torch, bnb_4bit_compute_dtype, None) if bnb_4bit_compute_dtype else None
        if bnb_4bit_compute_dtype and dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"bnb_4bit_compute_dtype={bnb_4bit_compute_dtype!r}: 'float32', 'bfloat16' or "
                "'float16'."
            )
        config = BitsAndBytesConfig(
            load_in_4bit=load_in_4bit and not load_in_8bit,
            load_in_8bit=load_in_8bit,
            bnb_4bit_quant_type=bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
        )
        # transformers turns a missing dtype into float32; here it means "as the activations".
        config.bnb_4bit_compute_dtype = dtype  # type: ignore[assignment]
    if not (config.load_in_4bit or config.load_in_8bit):
        raise ConfigError(
            "This BitsAndBytesConfig quantizes nothing (load_in_4bit and load_in_8bit are both "
            "False). Set one of them, or use LoRAStrategy for a base that is not quantized."
        )
    if config.load_in_4bit and config.bnb_4bit_quant_storage != torch.uint8:
        raise UnsupportedError(
            f"bnb_4bit_quant_storage={config.bnb_4bit_quant_storage}: packed 4-bit codes stored as "
            "floats turn into random weights when a precision plugin casts the module. Leave it "
            "at uint8."
        )
    return config


def plain(value: Any) -> Any:
    """Returns ``value`` as JSON-able primitives: enums by value, sets sorted, dtypes by name."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def config_to_dict(config: PeftConfig) -> dict[str, Any]:
    """Returns the fields of a PEFT config that PEFT itself would write to a file, as primitives."""
    fields: dict[str, Any] = plain(config.to_dict())
    return fields


def config_from_dict(fields: Mapping[str, Any]) -> PeftConfig:
    """Returns the PEFT config that :func:`config_to_dict` wrote."""
    cls = type(get_peft_config({"peft_type": fields["peft_type"]}))
    known = {field.name for field in dataclasses.fields(cls)}
    return get_peft_config({k: v for k, v in fields.items() if k in known})


def quantization_to_dict(config: BitsAndBytesConfig | None) -> dict[str, Any] | None:
    """Returns the settings that decide what the quantized weights are, as primitives."""
    if config is None:
        return None
    if config.load_in_8bit:
        return {"load_in_8bit": True, "llm_int8_threshold": float(config.llm_int8_threshold)}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": bool(config.bnb_4bit_use_double_quant),
        "bnb_4bit_compute_dtype": plain(config.bnb_4bit_compute_dtype),
    }


def quantization_from_dict(fields: Mapping[str, Any] | None) -> BitsAndBytesConfig | None:
    """Returns the config that :func:`quantization_to_dict` wrote."""
    if fields is None:
        return None
    if fields.get("load_in_8bit"):
        return BitsAndBytesConfig(**fields)
    return quantization_config(
        **{key: value for key, value in fields.items() if key != "load_in_4bit"}
    )
