"""Positions and attention settings of a GGUF file, as a transformers config.

transformers reads some of these numbers for some architectures and takes its own defaults for the
others, so that the model would compute other numbers than it was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_peft.errors import UnsupportedError, itemize

# Numbers of a scaling of which transformers knows other values only for YaRN, or none: ours by
# llama.cpp's, with the value that changes nothing.
_NEUTRAL = {
    "scaling.alpha": 0.0,
    "scaling.attn_factor": 1.0,
    "scaling.yarn_ext_factor": 1.0,
    "scaling.yarn_attn_factor": 1.0,
    "scaling.yarn_log_multiplier": 0.0,
}
_BETAS = {"scaling.yarn_beta_fast": "beta_fast", "scaling.yarn_beta_slow": "beta_slow"}
# Layers of the one size of each whose scores llama.cpp divides by the root of the model's width per
# head; no file says so. Those of other sizes are divided by the root of a head's size.
_WIDE_SCORES = {"gemma2": 46, "gemma3": 62}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Its layers have heads of two sizes, all of which transformers has defaults for.
_TWO_SIZES = ("gemma4",)


def apply_metadata(config: Any, metadata: Mapping[str, Any], architecture: str, name: str) -> None:
    """Sets what a file says and transformers has not read."""
    text = config.get_text_config()
    # A value that is not there, or that a converter wrote for "none".
    there = {key: value for key, value in metadata.items() if value not in (None, "", "none")}
    found = [*_heads(text, there, architecture), *_window(text, there)]
    found += [*_scores(text, there, architecture)]
    # After the size of heads, which the share of a head that is rotated is of.
    found += [*_rope(text, there, architecture)]
    if found:
        raise UnsupportedError(
            f"{name!r} has metadata that transformers' {type(text).__name__} has no place for, so "
            "that the model would compute other numbers:"
            + itemize([f"{architecture}.{key}={value!r}" for key, value in found])
            + "\nUse the model in transformers' own format."
        )


Problem = tuple[str, Any]


def _heads(text: Any, there: Mapping[str, Any], architecture: str) -> Iterator[Problem]:
    size, values = there.get("attention.key_length"), there.get("attention.value_length")
    if architecture in _TWO_SIZES or size is None:
        return
    if values not in (None, size):
        yield "attention.value_length", values
    if size != head_size(text) and not _set(text, "head_dim", size):
        yield "attention.key_length", size


def head_size(text: Any) -> int | None:
    """Returns the numbers in an attention head; ``None`` where there are no such heads."""
    for name in ("head_dim", "d_kv"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    heads = getattr(text, "num_attention_heads", None)
    return int(text.hidden_size) // heads if heads else None


def _scores(text: Any, there: Mapping[str, Any], architecture: str) -> Iterator[Problem]:
    """Sets what the scores of attention are divided by, and where they and logits are capped."""
    layers = _WIDE_SCORES.get(architecture)
    if layers is not None:
        wide = text.num_hidden_layers == layers
        width = text.hidden_size // text.num_attention_heads
        text.query_pre_attn_scalar = width if wide else head_size(text)
    for key in _CAPS:
        if there.get(key) and not _set(text, key, there[key]):
            yield key, there[key]


def _window(text: Any, there: Mapping[str, Any]) -> Iterator[Problem]:
    window = there.get("attention.sliding_window")
    longest = there.get("context_length") or getattr(text, "max_position_embeddings", None)
    if not window or (isinstance(window, int) and longest and window >= longest):
        return
    used = getattr(text, "use_sliding_window", True)
    if not (used and isinstance(window, int) and _set(text, "sliding_window", window)):
        yield "attention.sliding_window", window


def _rope(text: Any, there: Mapping[str, Any], architecture: str) -> Iterator[Problem]:
    values = {key[5:]: value for key, value in there.items() if key.startswith("rope.")}
    rope = getattr(text, "rope_parameters", None)
    # Layers of two kinds have two ropes, and a file's numbers are of those that attend to all.
    whole = rope.get("full_attention", rope) if isinstance(rope, dict) else None
    base, scaled = values.get("freq_base"), _scaling(values)
    if not isinstance(rope, dict) or not isinstance(whole, dict):
        if base or scaled:
            yield "rope.freq_base", base
        return
    if base:
        _set_base(whole, base)
    for key in ("freq_base_swa", "local.freq_base"):
        if values.get(key) and whole is not rope:
            _set_base(rope["sliding_attention"], values[key])
        elif values.get(key):
            yield f"rope.{key}", values[key]
    yield from _rotated(text, whole, values, architecture)
    yield from _scale(whole, values, scaled, there.get("context_length"))


def _set_base(rope: dict[str, Any], base: Any) -> None:
    if not math.isclose(rope.get("rope_theta") or 0, base, rel_tol=1e-6):
        rope["rope_theta"] = float(base)


def _rotated(
    text: Any, rope: dict[str, Any], values: Mapping[str, Any], architecture: str
) -> Iterator[Problem]:
    width, size = values.get("dimension_count"), head_size(text)
    if not width or not size or architecture in _TWO_SIZES:
        return
    share = rope.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None)
    now = int(size * share) if share else getattr(text, "rotary_dim", None) or size
    if now == width:
        return
    if "partial_rotary_factor" not in rope or not isinstance(width, int):
        yield "rope.dimension_count", width
    else:
        rope["partial_rotary_factor"] = width / size


def _scaling(values: Mapping[str, Any]) -> Any:
    kind, factor = values.get("scaling.type"), values.get("scaling.factor")
    # The name in old files, which had one kind.
    if kind is None and values.get("scale_linear") not in (None, 0, 1):
        return "linear"
    return None if kind == "linear" and factor in (None, 0, 1) else kind


def _scale(
    rope: dict[str, Any], values: Mapping[str, Any], kind: Any, longest: int | None
) -> Iterator[Problem]:
    for key, neutral in _NEUTRAL.items():
        if values.get(key) not in (None, neutral):
            yield f"rope.{key}", values[key]
    factor = values.get("scaling.factor") or values.get("scale_linear")
    if kind == "linear" and factor:
        rope |= {"rope_type": "linear", "factor": float(factor)}
    elif kind == "yarn" and factor:
        length = values.get("scaling.original_context_length") or longest
        rope |= {"rope_type": "yarn", "factor": float(factor)}
        rope["original_max_position_embeddings"] = length
        rope |= {ours: float(values[key]) for key, ours in _BETAS.items() if values.get(key)}
    elif kind is not None:
        yield "rope.scaling.type", kind


def _set(text: Any, name: str, value: Any) -> bool:
    """Sets a value of a config; whether it has one of that name."""
    if not hasattr(text, name):
        return False
    try:
        setattr(text, name, value)
    except (AttributeError, TypeError, ValueError):
        return False
    return bool(getattr(text, name) == value)
