"""Streamed writing of GGUF files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_peft.errors import CheckpointError, ConfigError

# Kinds of numbers that are written here; others by llama.cpp's own program.
KINDS = ("f32", "f16", "bf16", "q8_0")
_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}
# Rows of one tensor that are converted at a time.
_ROWS = 8192

Progress = Callable[[str, int, int], None]


def has_gguf() -> bool:
    """Whether the package that writes GGUF is installed."""
    return find_spec("gguf") is not None


def require_gguf() -> None:
    """Refuses to write GGUF without the package."""
    if not has_gguf():
        raise ConfigError(
            "GGUF files are written by the package gguf, which is not installed: "
            "pip install 'lightning-peft[gguf]'"
        )


def gguf() -> Any:
    """Returns the package, which need not be installed."""
    return import_module("gguf")


@dataclass
class WrittenTensor:
    """One tensor of a GGUF file, outermost dimension first; ``values`` are asked for once."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]
    kind: str

    @classmethod
    def of(cls, name: str, value: Tensor, kind: str) -> WrittenTensor:
        """A tensor that is at hand."""
        return cls(name, tuple(value.shape), lambda: value, kind)

    @property
    def type(self) -> Any:
        """The same as ``gguf``'s type."""
        return gguf().GGMLQuantizationType[self.kind.upper()]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        block, size = gguf().GGML_QUANT_SIZES[self.type]
        return torch.Size(self.shape).numel() // block * size


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Returns the kind of a tensor in a file of one kind, as llama.cpp's converter chooses it.

    Vectors and routers of experts are float32.
    """
    if len(shape) < 2 or name.endswith(".ffn_gate_inp.weight"):
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


def new_writer(file: Path, name: str, kind: str | None) -> Any:
    """Returns a ``gguf.GGUFWriter`` for llama.cpp's architecture ``name``."""
    writer = gguf().GGUFWriter(file, name)
    if kind is not None:
        writer.add_file_type(gguf().LlamaFileType[_FILE_TYPES[kind]])
        writer.add_quantization_version(gguf().GGML_QUANT_VERSION)
    return writer


def write_tensors(writer: Any, tensors: list[WrittenTensor], progress: Progress) -> int:
    """Writes a file with the facts in ``writer``, and flushes it; returns the tensors' bytes."""
    total, done = sum(tensor.bytes for tensor in tensors), 0
    for tensor in tensors:
        # Any dtype but uint8, which would be taken for the shape in bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, float, tensor.bytes, tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_encoded(tensor))
            done += tensor.bytes
            progress("writing GGUF", done, total)
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        writer.close()
    return total


def _encoded(tensor: WrittenTensor) -> Any:
    """Returns the bytes of a tensor, a few rows of which are in float32 at a time."""
    values = tensor.values()
    assert tuple(values.shape) == tensor.shape, tensor.name
    parts = []
    # Of experts, one at a time: weights of all are too many to be copied.
    matrices = values.unbind() if values.ndim > 2 else (values,)
    for rows in chain.from_iterable(matrix.split(_ROWS) for matrix in matrices):
        encoded = gguf().quantize(rows.float().contiguous().numpy(), tensor.type)
        if tensor.kind == "f16" and not np.isfinite(encoded).all():
            raise CheckpointError(
                f"{tensor.name} holds values beyond 65504, where float16 ends. Write bf16 or f32 "
                "(--outtype)."
            )
        parts.append(encoded.reshape(-1).view(np.uint8))
    return np.concatenate(parts)


def sha256_of(file: Path) -> str:
    """Returns the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
