"""The methods of PEFT whose adapters are injected here, and why the others are not."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig

from lightning_peft.engine.primitives import to_primitives
from lightning_peft.errors import ConfigError, UnsupportedError

# Each passes the comparison with PEFT's own model class in the tests.
METHODS = (
    "LORA",
    "ADAMSS",
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "PEANUT",
    "PSOFT",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TRAINABLE_TOKENS",
    "WAVEFT",
)

_WRAP = "peft.get_peft_model in your LightningModule"
_SHARED = "its adapters share tensors between layers, and keep them outside of the layers"
_REASONS = {
    "FROD": _SHARED,
    "PVERA": _SHARED,
    "TINYLORA": _SHARED,
    "UNILORA": _SHARED,
    "VBLORA": _SHARED,
    "VERA": _SHARED,
    "RANDLORA": "its adapters share random projections, and keep them outside of the layers",
    "LILY": "its layers share one tensor, and PEFT cannot merge it",
    "OSF": "it rewrites the base weights, which checkpoints of adapters do not hold",
    "POLY": "its forward pass takes the task of each row as an argument",
    "XLORA": "it mixes adapters that exist already through a classifier of its own",
    "SHADOW": "it adds a second model next to the first",
}
# Where PEFT would choose other layers than the linear ones, or none.
_NEEDS_TARGETS = {
    "LN_TUNING": "the normalization layers, for example ['input_layernorm']",
    "TRAINABLE_TOKENS": "the embedding, for example ['embed_tokens']",
}


def refuse_method(config: PeftConfig) -> None:
    """Refuses configs of methods that cannot be injected into a module.

    Raises:
        ConfigError: If the method needs layers that the config does not name.
        UnsupportedError: If the method is not one of :data:`METHODS`.
    """
    name, method = type(config).__name__, str(to_primitives(config.peft_type))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UnsupportedError(
            f"{name} adds virtual tokens in front of a language model's input; it is not injected "
            "into layers, so no strategy can add it to an arbitrary module. Wrap the model with "
            "peft.get_peft_model in your LightningModule and use Lightning's own strategies."
        )
    if method == "ADALORA":
        raise UnsupportedError(
            "AdaLoRA reallocates ranks during training through its own model wrapper; injected "
            "into a module its budget would never move and it would silently be plain SVD-LoRA. "
            "Use LoRA with `rank_pattern`, or peft.get_peft_model in your LightningModule."
        )
    if method not in METHODS:
        reason = _REASONS.get(method, "it was not compared with PEFT here")
        raise UnsupportedError(
            f"{name} ({method}) is not among the methods that are injected: {reason}. Use one of "
            f"{', '.join(METHODS)}, or {_WRAP}."
        )
    if getattr(config, "use_asa", False):
        raise UnsupportedError(
            f"{name} with use_asa=True: it moves its budget through PEFT's model class in each "
            f"step, and would never move here. Set it to False, or use {_WRAP}."
        )
    targets: Any = getattr(config, "target_modules", None)
    if method in _NEEDS_TARGETS and (targets is None or str(targets).lower() == "all-linear"):
        raise ConfigError(
            f"{name} without target_modules: name {_NEEDS_TARGETS[method]}. Without names, "
            "adapters go on linear layers, which is not what this method is for."
        )
