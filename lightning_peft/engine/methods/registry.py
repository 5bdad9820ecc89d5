"""Registry of PEFT methods, with the reasons for unsupported ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from lightning_peft.engine.methods.adalora import ADALORA
from lightning_peft.engine.methods.base import InPlaceMethod, Method
from lightning_peft.engine.methods.dora import DORA
from lightning_peft.engine.methods.lora import LORA
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.errors import ConfigError, UnsupportedError

_EVERY = ("padding_mode", "dilation", "groups", "uneven")
_PADDING = ("padding_mode",)
# Each passes the comparison with PEFT's own model class in the tests.
METHODS: dict[str, Method] = {
    method.peft_type: method
    for method in (
        LORA,
        ADALORA,
        Method("ADAMSS"),
        Method("BEFT"),
        Method("BOFT", ignored_properties=_EVERY),
        Method("C3A"),
        Method("DEFT"),
        Method("DELORA"),
        Method("FOURIERFT"),
        Method("GLORA", dense_only=True),
        Method("GRALORA"),
        Method("HIRA", ignored_properties=_PADDING),
        Method("HRA", ignored_properties=_EVERY),
        Method("IA3"),
        Method(
            "LN_TUNING",
            targets="the normalization layers, for example ['input_layernorm']",
            dense_only=True,
        ),
        Method("LOHA", ignored_properties=_PADDING),
        Method("LOKR", ignored_properties=_PADDING),
        Method("MISS"),
        Method("OFT"),
        Method("PEANUT"),
        Method("PSOFT"),
        Method("RANDLORA", projections=("randlora_A", "randlora_B")),
        Method("ROAD"),
        Method("SHIRA", dense_only=True),
        Method("SUPERTUNING"),
        Method("TRAINABLE_TOKENS", targets="the embedding, for example ['embed_tokens']"),
        Method("VERA", projections=("vera_A", "vera_B")),
        Method("WAVEFT"),
    )
}

_WRAP = "peft.get_peft_model in your LightningModule"
_SHARED = "its adapters share tensors between layers, and keep them outside of the layers"
_VIRTUAL = "it adds virtual tokens in front of a language model's input, and nothing to layers"
# Why PEFT's other methods are not injected; with METHODS, all that PEFT lists.
REASONS = {
    "PROMPT_TUNING": _VIRTUAL,
    "MULTITASK_PROMPT_TUNING": _VIRTUAL,
    "P_TUNING": _VIRTUAL,
    "PREFIX_TUNING": _VIRTUAL,
    "CPT": _VIRTUAL,
    "CARTRIDGE": _VIRTUAL,
    "ADAPTION_PROMPT": "it puts prompts into attention modules by classes for a few model types",
    "FROD": _SHARED,
    "PVERA": "each forward pass draws noise, and it was not compared with PEFT here",
    "TINYLORA": _SHARED,
    "UNILORA": _SHARED,
    "VBLORA": _SHARED,
    "LILY": "its layers share one tensor, and PEFT cannot merge it",
    "OSF": "it rewrites the base weights, which checkpoints of adapters do not hold",
    "POLY": "its forward pass takes the task of each row as an argument",
    "XLORA": "its model class runs each batch twice, to mix finished adapters by a classifier that "
    "is in no layer; PEFT has it for language models alone",
    "SHADOW": "it adds a second model next to the first",
}


def register_method(method: Method) -> None:
    """Registers a method; one of the same ``peft_type`` is replaced."""
    METHODS[method.peft_type] = method


def method_of(config: PeftConfig | Mapping[str, Any]) -> Method:
    """The method of a config, or of its fields as primitives, that :func:`refuse_method` passed."""
    fields = config if isinstance(config, Mapping) else vars(config)
    method = METHODS[str(to_primitives(fields["peft_type"]))]
    return DORA if method is LORA and fields.get("use_dora") else method


def in_place_method(config: PeftConfig) -> InPlaceMethod | None:
    """The method of ``config`` where it works in place with these settings, else ``None``."""
    method = method_of(config)
    return method if isinstance(method, InPlaceMethod) and method.is_in_place(config) else None


def not_injected(name: str, peft_type: str) -> UnsupportedError:
    """Returns the error for a config class ``name`` of a method that is not injected."""
    reason = REASONS.get(peft_type, "it was not compared with PEFT here")
    return UnsupportedError(
        f"{name} ({peft_type}) is not among the methods that are injected: {reason}. Use one of "
        f"{', '.join(METHODS)}, or {_WRAP}."
    )


def refuse_method(config: PeftConfig) -> None:
    """Refuses configs of methods that cannot be injected into a module."""
    name, method = type(config).__name__, str(to_primitives(config.peft_type))
    if method not in METHODS:
        raise not_injected(name, method)
    if getattr(config, "use_asa", False):
        raise UnsupportedError(
            f"{name} with use_asa=True: it moves its budget through PEFT's model class in each "
            f"step, and would never move here. Set it to False, or use {_WRAP}."
        )
    targets: Any = getattr(config, "target_modules", None)
    needed = METHODS[method].targets
    if needed and (targets is None or str(targets).lower() == "all-linear"):
        raise ConfigError(
            f"{name} without target_modules: name {needed}. Without names, "
            "adapters go on linear layers, which is not what this method is for."
        )
