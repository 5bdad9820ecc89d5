"""Tensors of a GGUF file by their transformers names, dequantized on access."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_peft.compat.gguf import (
    dequantize,
    each_file_parsed_once,
    get_gguf_hf_weights_map,
    tensor_processor,
)
from lightning_peft.compat.transformers import tied_parameters
from lightning_peft.engine.loading.gguf_model import GgufModel
from lightning_peft.errors import UnsupportedError, first_line, itemize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GgufTensor:
    """A parameter in a GGUF file, which is read and dequantized by ``tensor[...]``.

    What transformers' loading takes in place of a slice of a safetensors file.

    Attributes:
        name: transformers' name.
        shape: That of the parameter.
        dtype: Of the values.
        model: The file.
        sources: The entries of its table that the parameter is made of.
        names: transformers' names by those in the file.
        processor: What undoes llama.cpp's changes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    model: GgufModel = field(repr=False)
    sources: list[dict[str, Any]] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    processor: Any = field(repr=False)

    def __getitem__(self, index: Any) -> Tensor:
        whole: dict[str, Tensor] = {}
        # A processor notes where it is, and several tensors are read at a time.
        processor = copy.copy(self.processor)
        for source in self.sources:
            values = dequantize(self._stored(source), source["kind"])
            made = processor.process(
                weights=values,
                name=source["name"],
                tensor_key_mapping=self.names,
                parsed_parameters={"tensors": whole},
            )
            if made.name is not None:
                array = np.ascontiguousarray(made.weights, dtype=np.float32)
                # Values that are stored as they are, are still the file's.
                whole[self.name] = torch.from_numpy(
                    array if array.flags.writeable else array.copy()
                )
        value = whole[self.name]
        if tuple(value.shape) != self.shape:
            # Layers that are quantized as they are read would take any shape.
            raise UnsupportedError(
                f"{self.name} has the shape {tuple(value.shape)} in {self.model.file.name!r}, and "
                f"{self.shape} in the model of its metadata. The file contradicts itself, or "
                "transformers reads this architecture from GGUF only in part. Use the model in "
                "transformers' own format."
            )
        return value[index].to(self.dtype)

    def _stored(self, source: dict[str, Any]) -> np.ndarray:
        return np.memmap(
            self.model.file,
            dtype=source["dtype"],
            mode="r",
            offset=source["start"],
            shape=tuple(source["stored"]),
        )


def gguf_tensors(model: GgufModel, outline: nn.Module) -> dict[str, GgufTensor]:
    """Returns the tensors of a file by their names in a model; none is read."""
    config: Any = outline.config
    processor = tensor_processor(model.architecture, config.get_text_config().to_dict())
    names = _names(model, outline, processor)
    sources: dict[str, list[dict[str, Any]]] = {}
    unused = []
    for entry in model.tensors:
        target = names.get(entry["name"]) or names.get(entry["name"].removesuffix(".weight"))
        if target is None:
            unused.append(entry["name"])
        else:
            sources.setdefault(target, []).append(entry)
    shapes = {name: tuple(value.shape) for name, value in outline.state_dict().items()}
    _check_complete(model, outline, shapes, sources)
    _refuse_unused(model, config.get_text_config(), unused)
    _warn_unused(model, unused)
    return {
        name: GgufTensor(name, shapes[name], model.dtype, model, entries, names, processor)
        for name, entries in sources.items()
    }


def _names(model: GgufModel, outline: nn.Module, processor: Any) -> dict[str, str]:
    try:
        with each_file_parsed_once():
            found: dict[str, str] = get_gguf_hf_weights_map(outline, processor)
    except (NotImplementedError, AttributeError) as error:
        raise UnsupportedError(
            f"{model.file.name!r} has the architecture {model.architecture!r}, and the names of "
            f"its tensors are not known ({first_line(error)}). Use the model in transformers' own "
            "format."
        ) from error
    return found


def _check_complete(
    model: GgufModel,
    outline: Any,
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, list[dict[str, Any]]],
) -> None:
    tied = tied_parameters(outline)
    # A head may be new; the body may not.
    body = f"{outline.base_model_prefix}."
    lacking = [
        name
        for name, _ in outline.named_parameters()
        if name not in sources and name not in tied and name.startswith(body)
    ]
    if lacking:
        raise UnsupportedError(
            f"{model.file.name!r} (architecture {model.architecture!r}) lacks parameters of "
            f"{type(outline).__name__}, which would be random:"
            + itemize(lacking, 5)
            + "\nUse the model in transformers' own format."
        )


def _refuse_unused(model: GgufModel, config: Any, unused: list[str]) -> None:
    """Refuses tensors of a layer that the model lacks; blocks after the last predict tokens."""
    layers = getattr(config, "num_hidden_layers", 0)
    blocks = (re.match(r"blk\.(\d+)\.", name) for name in unused)
    lost = [
        name
        for name, block in zip(unused, blocks, strict=True)
        if (block and int(block[1]) < layers) or name.startswith("rope_factors_")
    ]
    if lost:
        raise UnsupportedError(
            f"{model.file.name!r} (architecture {model.architecture!r}) has tensors that "
            "transformers' model has no place for, and without which it computes other numbers:"
            + itemize(lost, 5)
            + "\nUse the model in transformers' own format."
        )


def _warn_unused(model: GgufModel, unused: list[str]) -> None:
    if "rope_freqs.weight" in unused:
        log.warning(
            "%s scales its position embeddings (rope_freqs), which transformers does not read from "
            "GGUF: its answers differ from those of llama.cpp, most of all to long texts. The "
            "model in transformers' own format has the scaling in its config.",
            model.file.name,
        )
    others = [name for name in unused if name != "rope_freqs.weight"]
    if others:
        log.warning(
            "%d tensors of %s are not part of the model and are left out: %s",
            len(others),
            model.file.name,
            ", ".join(others[:5]) + (", ..." if len(others) > 5 else ""),
        )
