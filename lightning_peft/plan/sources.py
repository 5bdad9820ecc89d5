"""Sources of meta copies and their sample batches: a hub name, folder, config or module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_peft import engine
from lightning_peft.compat.transformers import causal_lm_class, model_from_config
from lightning_peft.errors import (
    ConfigError,
    LightningPeftError,
    UnsupportedError,
    similar_names,
)
from lightning_peft.plan.batch_size import map_tensors, tensors_of
from lightning_peft.plan.meta_copy import meta_copy
from lightning_peft.plan.trace import Step
from lightning_peft.task_registry import TASKS

BatchMaker = Callable[[int, int, bool], dict[str, Any]]


@dataclass(frozen=True)
class ModelSource:
    """A model to plan for."""

    name: str
    # On the meta device, without adapters.
    build_meta_copy: Callable[[], nn.Module]
    # Makes one of so many rows and tokens, with a mask where rows are padded.
    batch: Callable[[int, int, bool], Any]
    vocabulary: int | None = None
    # Sequence that the model was made for, if it says so.
    longest: int | None = None
    # A causal language model of transformers.
    causal: bool = False
    # Returns the loss of a module on a batch, where it is not the module's own.
    step: Step | None = None
    # Whether `batch` can make batches of other rows, and of other lengths.
    rows_change: bool = True
    length_changes: bool = True


def from_name(name: str, revision: str | None = None, dtype: str = "auto") -> ModelSource:
    """Returns the source for a hub name, a folder with at least ``config.json``, or a GGUF file.

    No weights are read and no code of the repository is run.
    """
    try:
        config = engine.load_config(name, revision=revision, trust_remote_code=False)
    except LightningPeftError:
        # Of a GGUF file, and says what is wrong with it.
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--model {name!r}: no config of transformers could be read there: {reason} Give a "
            "name on the hub, a folder with a config.json, or a GGUF file (org/name:file.gguf)."
        ) from error
    return from_config(config, name, dtype)


def from_config(config: Any, name: str = "", dtype: str = "auto") -> ModelSource:
    """Returns the source for a transformers config.

    The class is the first of its ``architectures``, or the causal language model of its kind.
    """
    weights = _dtype(dtype, config)
    model_class = _class_of(config)
    text = config.get_text_config()

    def build_meta_copy() -> nn.Module:
        own = copy.deepcopy(config)
        own.quantization_config = None
        with torch.device("meta"):
            made = model_from_config(model_class, own, weights)
        made.tie_weights()
        if getattr(config, "quantization_config", None) is not None:
            engine.lay_out_loaded_format(made, config.quantization_config)
        model: nn.Module = made
        return model

    return ModelSource(
        name or model_class.__name__,
        build_meta_copy,
        batch_maker(model_class, config),
        getattr(text, "vocab_size", None),
        getattr(text, "max_position_embeddings", None),
        causal=model_class is causal_lm_class(config),
        length_changes=model_class.main_input_name != "pixel_values",
    )


def _dtype(requested: str, config: Any) -> torch.dtype:
    value = getattr(config, "dtype", None) if requested == "auto" else requested
    known = ("float32", "bfloat16", "float16")
    name = str(value or "float32").removeprefix("torch.")
    if name not in known:
        raise ConfigError(f"dtype={requested!r}: one of auto, {', '.join(known)}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _class_of(config: Any) -> Any:
    names = list(getattr(config, "architectures", None) or [])
    if not names:
        model_class = causal_lm_class(config)
        if model_class is None:
            raise UnsupportedError(
                f"{type(config).__name__} names no architecture, and there is no causal language "
                "model of its kind. Put the class into `architectures` of the config.json."
            )
        return model_class
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise UnsupportedError(
            f"architectures={names} in the config: transformers {transformers.__version__} has no "
            f"class of that name{similar_names(names[0], dir(transformers))}. Code that comes with "
            "a model is not run to plan; build the model yourself, and call plan_memory with it."
        )
    return model_class


def from_module(module: nn.Module, batch: Any) -> ModelSource:
    """Returns the source for a module, which is not changed, and a batch of its training step.

    Without one, a transformers model gets batches of any size.
    """
    if not any(True for _ in module.parameters()):
        raise ConfigError(
            f"{type(module).__name__} has no parameters yet. Call its configure_model() or setup() "
            "first, within `with torch.device('meta'):` if the weights are not to be loaded."
        )
    config: Any = getattr(module, "config", None)
    # A LightningModule holds its model somewhere.
    configs: list[Any] = [getattr(child, "config", None) for child in module.modules()]
    text: Any = next((c.get_text_config() for c in configs if hasattr(c, "get_text_config")), None)
    if batch is not None:
        rows = rows_of(batch)
        maker: Any = partial(_of_rows, batch, rows)
    elif hasattr(config, "get_text_config"):
        rows, maker = None, batch_maker(type(module), config)
    else:
        raise ConfigError(
            f"{type(module).__name__} is not a transformers model, so it is not known what its "
            "batches look like. Pass one as `batch`."
        )
    return ModelSource(
        type(module).__name__,
        lambda: meta_copy(module),
        maker,
        getattr(text, "vocab_size", None),
        getattr(text, "max_position_embeddings", None),
        rows_change=batch is None or rows is not None,
        length_changes=batch is None,
    )


def rows_of(batch: Any) -> int | None:
    """Returns the size that the first dimension of all tensors of a batch has, if it is one."""
    sizes = {one.shape[0] for one in tensors_of(batch) if one.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def _of_rows(batch: Any, known: int | None, rows: int, length: int, padded: bool) -> Any:
    """Returns a batch like ``batch`` of so many rows, without its values."""
    if known is None:
        return batch

    def resized(value: Tensor) -> Tensor:
        shape = (rows, *value.shape[1:]) if value.ndim else ()
        return torch.empty(shape, dtype=value.dtype) if shape else value

    return map_tensors(resized, batch)


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
