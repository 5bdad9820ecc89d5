"""From ``load_in_8bit`` and ``bnb_4bit_*`` to transformers' ``BitsAndBytesConfig`` and back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from lightning_peft.engine.primitives import to_primitives
from lightning_peft.errors import ConfigError, UnsupportedError, itemize


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
        ConfigError: If the values cannot work, all of them at once.
        UnsupportedError: If packed codes are to be stored as floats.
    """
    if config is None:
        config = _bits_and_bytes(
            {
                "load_in_4bit": load_in_4bit and not load_in_8bit,
                "load_in_8bit": load_in_8bit,
                "bnb_4bit_quant_type": bnb_4bit_quant_type,
                "bnb_4bit_use_double_quant": bnb_4bit_use_double_quant,
                "bnb_4bit_compute_dtype": bnb_4bit_compute_dtype,
            }
        )
    elif isinstance(config, Mapping):
        config = _bits_and_bytes(config)
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


def _bits_and_bytes(fields: Mapping[str, Any]) -> BitsAndBytesConfig:
    # What BitsAndBytesConfig.to_dict adds to its fields.
    fields = {k: v for k, v in fields.items() if k != "quant_method" and not k.startswith("_")}
    known = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    problems = [
        f"{name!r}: BitsAndBytesConfig has no such field; it has {', '.join(sorted(known))}"
        for name in sorted(set(fields) - known)
    ]
    kind, dtype = fields.get("bnb_4bit_quant_type", "fp4"), fields.get("bnb_4bit_compute_dtype")
    if kind not in ("nf4", "fp4"):
        problems.append(f"bnb_4bit_quant_type={kind!r}: 'nf4' or 'fp4'")
    elif fields.get("load_in_8bit") and kind == "fp4" and "bnb_4bit_quant_type" in fields:
        problems.append("load_in_8bit=True with bnb_4bit_quant_type='fp4': drop one of the two")
    if fields.get("llm_int8_has_fp16_weight"):
        problems.append("llm_int8_has_fp16_weight=True: such weights are not stored in 8 bits")
    if to_primitives(dtype) not in (None, "float32", "bfloat16", "float16"):
        problems.append(f"bnb_4bit_compute_dtype={dtype!r}: 'float32', 'bfloat16' or 'float16'")
    if problems:
        raise ConfigError("These quantization settings cannot work:" + itemize(problems))
    try:
        config = BitsAndBytesConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"BitsAndBytesConfig does not accept these settings: {error}") from error
    if dtype is None:
        # transformers turns a missing dtype into float32; here it means "as the activations".
        config.bnb_4bit_compute_dtype = None  # type: ignore[assignment]
    return config


_OF_8BIT = ["load_in_8bit", "llm_int8_threshold"]
_OF_4BIT = [
    "load_in_4bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
]


def quantization_to_dict(config: BitsAndBytesConfig | None) -> dict[str, Any] | None:
    """Returns the settings that decide what the quantized weights are, as primitives."""
    if config is None:
        return None
    names = _OF_8BIT if config.load_in_8bit else _OF_4BIT
    fields = {name: to_primitives(getattr(config, name)) for name in names}
    if config.llm_int8_skip_modules:
        fields["llm_int8_skip_modules"] = to_primitives(config.llm_int8_skip_modules)
    return fields


def quantization_from_dict(fields: Mapping[str, Any] | None) -> BitsAndBytesConfig | None:
    """Returns the config that :func:`quantization_to_dict` wrote."""
    return None if fields is None else quantization_config(fields)
