"""Atomic writing of export folders, and streamed writing of safetensors.

safetensors' own writer takes all tensors of a file at once, and shards of models have gigabytes.
The format: 8 bytes with the length of a JSON header, the header, and the values one after another.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.errors import ConfigError, StorageError
from lightning_peft.export.base import COMPANIONS, DTYPES
from lightning_peft.export.file_layout import StoredTensor
from lightning_peft.file_errors import storage_problem

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_output_free(output: Path) -> None:
    """Refuses a place where something is: a file, or a folder that is not empty."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(
            f"The output {str(output)!r} is there already. Remove it, or name another."
        )


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yields an unfinished folder that becomes ``output`` if the body succeeds.

    What processes left that were killed while they wrote the same folder is removed.

    Raises:
        ConfigError: If there can be no such folder, or something is there.
        StorageError: If it cannot be written to, or the disk is full.
    """
    check_output_free(output)
    unfinished = output.with_name(f".incomplete-{os.getpid()}-{output.name}")
    for left in output.parent.glob(f".incomplete-*-{output.name}"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"The output {str(output)!r} cannot be made: {error.strerror}. Name a folder that can "
            "be written to."
        ) from error
    try:
        yield unfinished
        if output.is_dir():
            output.rmdir()
        os.replace(unfinished, output)
    except OSError as error:
        problem = storage_problem(unfinished, error)
        if problem is None:
            raise
        raise StorageError(
            f"The output {str(output)!r} was not written: {problem}. Then run the same command "
            "again."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(file: Path, content: Any, **options: Any) -> None:
    """Writes JSON for people to read; ``options`` are those of :func:`json.dumps`."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2, **options) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path, left_out: Container[str]) -> None:
    """Copies what lies next to the weights of a model, but for files of some names."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.name not in left_out and file.is_file():
                shutil.copyfile(file, folder / file.name)


def in_file_order(entries: dict[str, StoredTensor]) -> list[str]:
    """Returns the keys as written: wide dtypes first, so that each is at a multiple of its size.

    Those of one width stay in their order.
    """
    return sorted(entries, key=lambda key: -entries[key].dtype.itemsize)


def write_safetensors(
    file: Path, entries: dict[str, StoredTensor], tensors: Iterable[Tensor]
) -> None:
    """Writes a safetensors file and flushes it to disk.

    ``tensors`` are the values of ``entries``, one at a time, in the order of :func:`in_file_order`.
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
