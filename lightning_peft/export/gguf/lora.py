"""GGUF adapters for llama.cpp's ``--lora``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft import engine
from lightning_peft.engine.layers.dora import DoraLayer
from lightning_peft.engine.layers.lora import LoraEmbedding, LoraLinear
from lightning_peft.engine.streamed_merging import StreamedMerge
from lightning_peft.errors import UnsupportedError, itemize
from lightning_peft.export.gguf.architectures import Architecture
from lightning_peft.export.gguf.files import Progress, WrittenTensor, new_writer, write_tensors

_ADAPTER = "default"
KINDS = ("f32", "f16")


def check_adapter(merge: StreamedMerge, architecture: Architecture) -> None:
    """Refuses an adapter that is more than low-rank factors of layers that llama.cpp knows."""
    whole = sorted(merge.replaced())
    if whole:
        raise UnsupportedError(
            "The adapter holds whole tensors, and a GGUF adapter takes low-rank factors alone:"
            + itemize(whole, 5)
            + "\nExport the merged model, without --adapter-only and --with-adapter."
        )
    layers = engine.adapted_layers(merge.outline)
    others = [
        name
        for name, layer in layers.items()
        if isinstance(layer, DoraLayer) or not isinstance(layer, (LoraLinear, LoraEmbedding))
    ]
    if others:
        raise UnsupportedError(
            f"The adapter is not plain LoRA on linear layers and embeddings: {', '.join(others)}. "
            "Export the merged model, without --adapter-only and --with-adapter."
        )
    architecture.tensor_names([f"{name}.weight" for name in layers])


def write_adapter(
    file: Path,
    outline: nn.Module,
    architecture: Architecture,
    kind: str,
    name: str,
    progress: Progress,
) -> int:
    """Writes the adapter on ``outline`` as a GGUF file; returns the bytes of its tensors.

    llama.cpp multiplies by alpha over rank. One alpha stands in the file; where the layers differ
    in their factors, those of ``B`` hold the difference.
    """
    layers: dict[str, Any] = engine.adapted_layers(outline)
    settings = next(iter(layers.values())).adapter_settings[_ADAPTER]
    alpha = settings.scaling * settings.r
    writer = new_writer(file, architecture.family.name, None)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    tensors = [
        tensor
        for layer_name, layer in layers.items()
        for tensor in _factors(layer_name, layer, architecture, alpha, kind)
    ]
    return write_tensors(writer, tensors, progress)


def _factors(
    name: str, layer: Any, architecture: Architecture, alpha: float, kind: str
) -> Iterator[WrittenTensor]:
    weight = f"{name}.weight"
    there, settings = architecture.tensor_name(weight), layer.adapter_settings[_ADAPTER]
    a, b = (factor.detach() for factor in layer.factors(_ADAPTER))
    if isinstance(layer, LoraEmbedding):
        # llama.cpp looks up rows of A.
        a = a.T
    own = settings.scaling * settings.r / alpha
    b = architecture.converted(weight, b if own == 1 else b.float() * own)
    for suffix, value in (("lora_a", a), ("lora_b", b)):
        yield WrittenTensor.of(f"{there}.{suffix}", value, kind)
