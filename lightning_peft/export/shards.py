"""Writing safetensors files of which only one tensor is in memory at a time.

safetensors' own writer takes all tensors of a file at once, and shards of models have gigabytes.
The format: 8 bytes with the length of a JSON header, the header, and the values one after another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lightning_peft.export.base import DTYPES, StoredTensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def in_file_order(entries: dict[str, StoredTensor]) -> list[str]:
    """Returns the keys in the order in which their values are written: wide dtypes first.

    So that every tensor starts at a multiple of its item size.
    """
    return sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))


def write_safetensors(
    file: Path, entries: dict[str, StoredTensor], tensors: Iterable[Tensor]
) -> None:
    """Writes a safetensors file and flushes it to disk.

    Args:
        file: The file; it is made.
        entries: Dtype and shape of each tensor, by key.
        tensors: Their values, one at a time, in the order of :func:`in_file_order`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order, end = in_file_order(entries), 0
    for key in order:
        stored, start = entries[key], end
        end += stored.numel * stored.dtype.itemsize
        header[key] = {
            "dtype": _NAMES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in zip(order, tensors, strict=True):
            stored = entries[key]
            assert (tensor.dtype, tuple(tensor.shape)) == (stored.dtype, stored.shape), key
            octets = tensor.contiguous().reshape(-1).view(torch.uint8)
            out.write(octets.numpy().data)
            del tensor, octets
        out.flush()
        os.fsync(out.fileno())
