"""``BitsAndBytesConfig`` of transformers, for both bitsandbytes backends."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from lightning_peft.engine.backends.base import QuantizationBackend
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.errors import ConfigError, UnsupportedError, itemize

NAME = "bitsandbytes"


class BitsAndBytesBackend(QuantizationBackend[BitsAndBytesConfig]):
    """A kind of weight that ``BitsAndBytesConfig`` describes."""

    name = NAME
    config_type = BitsAndBytesConfig
    skip_argument = "llm_int8_skip_modules"
    peft_modules = ("bnb",)

    def check_config(self, config: BitsAndBytesConfig) -> None:
        if not (config.load_in_4bit or config.load_in_8bit):
            raise ConfigError(
                "This BitsAndBytesConfig quantizes nothing (load_in_4bit and load_in_8bit are both "
                "False). Set one of them, or use LoRAStrategy for a base that is not quantized."
            )
        if config.load_in_4bit and config.bnb_4bit_quant_storage != torch.uint8:
            raise UnsupportedError(
                f"bnb_4bit_quant_storage={config.bnb_4bit_quant_storage}: packed 4-bit codes "
                "stored as floats turn into random weights when a precision plugin casts the "
                "module. Leave it at uint8."
            )

    def config_from_dict(self, fields: Mapping[str, Any]) -> BitsAndBytesConfig:
        # What BitsAndBytesConfig.to_dict adds to its fields.
        fields = {k: v for k, v in fields.items() if k != "quant_method" and not k.startswith("_")}
        problems = _problems(fields)
        if problems:
            raise ConfigError("These quantization settings cannot work:" + itemize(problems))
        try:
            config = BitsAndBytesConfig(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"BitsAndBytesConfig does not accept these settings: {error}"
            ) from error
        if fields.get("bnb_4bit_compute_dtype") is None:
            # transformers turns a missing dtype into float32; here it means "as the activations".
            config.bnb_4bit_compute_dtype = None  # type: ignore[assignment]
        return config


def _problems(fields: Mapping[str, Any]) -> list[str]:
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
        problems.append("llm_int8_has_fp16_weight=True: such weights are not stored as int8")
    if to_primitives(dtype) not in (None, "float32", "bfloat16", "float16"):
        problems.append(f"bnb_4bit_compute_dtype={dtype!r}: 'float32', 'bfloat16' or 'float16'")
    return problems


def to_dict(config: BitsAndBytesConfig, *names: str) -> dict[str, Any]:
    """The fields ``names``, and the modules that stay dense, as primitives."""
    fields = {name: to_primitives(getattr(config, name)) for name in names}
    if config.llm_int8_skip_modules:
        fields["llm_int8_skip_modules"] = to_primitives(config.llm_int8_skip_modules)
    return fields


def require_codes(layer: Any, quantized: bool) -> None:
    """Refuses a layer of bitsandbytes that is not quantized yet, or stays 16-bit."""
    if not quantized:
        raise UnsupportedError(
            f"A {type(layer).__name__} layer still holds its dense weight. bitsandbytes quantizes "
            "when a layer moves to a device: call module.to(device) before adapters are added."
        )
