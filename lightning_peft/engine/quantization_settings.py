"""From ``load_in_8bit`` and ``bnb_4bit_*``, or a config of any backend, to a checked config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.engine.backends.registry import checked_config, quantization_from_dict


def quantization_config(
    config: Any | Mapping[str, Any] | None = None,
    *,
    load_in_4bit: bool = True,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    bnb_4bit_use_double_quant: bool = True,
    bnb_4bit_compute_dtype: str | None = None,
) -> Any:
    """Fills a ``transformers.BitsAndBytesConfig``, or checks the config of any backend.

    Args:
        config: A ready config of a registered backend, or its fields with a ``quant_method``
            (without one, bitsandbytes); the other arguments are then not looked at.
        load_in_4bit: Four bits per parameter.
        load_in_8bit: Eight bits per parameter instead.
        bnb_4bit_quant_type: ``"nf4"`` or ``"fp4"``.
        bnb_4bit_use_double_quant: Quantize the block constants too (4.127 bits per parameter
            instead of 4.5).
        bnb_4bit_compute_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None`` follows
            the activations (and so the Trainer's ``precision``).

    Raises:
        ConfigError: If the values cannot work, all of them at once.
        UnsupportedError: If packed codes are to be stored as floats.
    """
    if config is None:
        config = {
            "load_in_4bit": load_in_4bit and not load_in_8bit,
            "load_in_8bit": load_in_8bit,
            "bnb_4bit_quant_type": bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": bnb_4bit_compute_dtype,
        }
    if isinstance(config, Mapping):
        return quantization_from_dict(config)
    return checked_config(config)
