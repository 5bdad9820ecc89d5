"""Sample batches for transformers models, by input and label type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_peft.errors import UnsupportedError
from lightning_peft.task_registry import TASKS

BatchMaker = Callable[[int, int, bool], dict[str, Any]]


def batch_maker(model_class: Any, config: Any) -> BatchMaker:
    """Returns a batch factory for a model class: rows, tokens, and whether rows are padded.

    Images have the size of the config, and audio has ``length`` samples or frames.
    """
    kind, name = getattr(model_class, "main_input_name", "input_ids"), model_class.__name__
    makers: dict[str, BatchMaker] = {
        "input_ids": _text,
        "pixel_values": lambda rows, length, padded: {"pixel_values": _images(rows, config)},
        "input_features": lambda rows, length, padded: {"input_features": _frames(rows, config)},
        "input_values": lambda rows, length, padded: {"input_values": torch.zeros(rows, length)},
    }
    other = kind == "input_features" and not hasattr(config, "max_source_positions")
    if kind not in makers or other:
        raise UnsupportedError(
            f"{name} takes {kind!r}, and sample batches are made for text (input_ids), images "
            "(pixel_values), audio (input_values) and Whisper's spectrograms only. Call "
            "plan_memory in Python with the model and a `batch` of yours."
        )

    def make(rows: int, length: int, padded: bool) -> dict[str, Any]:
        batch = makers[kind](rows, length, padded)
        labels = _labels(name, rows, length)
        return batch if labels is None else {**batch, "labels": labels}

    return make


def _text(rows: int, length: int, padded: bool) -> dict[str, Any]:
    batch = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
    # transformers leaves a mask out that is all ones, but not one without values.
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])} if padded else batch


def _images(rows: int, config: Any) -> Any:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.zeros(rows, getattr(config, "num_channels", 3), height, width)


def _frames(rows: int, config: Any) -> Any:
    """Spectrograms of the length that Whisper and its kin always take."""
    return torch.zeros(rows, config.num_mel_bins, 2 * config.max_source_positions)


def _labels(name: str, rows: int, length: int) -> Any:
    # Tasks of the same models may have none, such as those that learn from rewards.
    suffixes = {
        spec.base_suffix: spec.label_per
        for spec in TASKS.values()
        if spec.base_suffix and spec.label_per
    }
    per_token = ("LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
    per = next((per for end, per in suffixes.items() if name.endswith(end)), None)
    if name.endswith(per_token) or per == "token":
        return torch.zeros(rows, length, dtype=torch.long)
    return torch.zeros(rows, dtype=torch.long) if per == "row" else None
