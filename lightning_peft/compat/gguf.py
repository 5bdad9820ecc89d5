"""GGUF support of transformers, and the ``gguf`` package."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from transformers import modeling_gguf_pytorch_utils

# Public alternative: `from_pretrained(gguf_file=...)`, which holds all dequantized tensors at once,
# and takes no other quantization.
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES as GGUF_SUPPORTED_ARCHITECTURES,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor
from transformers.modeling_gguf_pytorch_utils import (
    get_gguf_hf_weights_map as get_gguf_hf_weights_map,
)
from transformers.utils import cached_file, extract_commit_hash, logging

# Its bar is tqdm's, which the switch for the bars of transformers does not reach.
vars(modeling_gguf_pytorch_utils)["tqdm"] = logging.tqdm

_lock = threading.Lock()
# Values that are made at a time: what is computed on the way stays small.
_AT_ONCE = 1 << 20


@contextmanager
def each_file_parsed_once() -> Iterator[None]:
    """Within the body, a GGUF file and a table of names are read once, not on every call.

    transformers parses all of a file's metadata for the config, again for the tokenizer and again
    for the weights, which takes seconds each, and makes the table of names for every module of a
    model.
    """
    package: Any = import_module("gguf")
    names = ("GGUFReader", "get_tensor_name_map")
    with _lock:
        before = {name: getattr(package, name) for name in names}
        for name, function in before.items():
            setattr(package, name, cache(function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(package, name, function)


def tensor_processor(architecture: str, config: dict[str, Any]) -> Any:
    """Returns the inverse of llama.cpp's changes to the tensors of an architecture."""
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)


def dequantize(data: np.ndarray, kind: int) -> np.ndarray:
    """Returns the float32 values of a tensor of a file.

    ``gguf.dequantize``, but for as many rows at a time as the cache of a core holds well: it takes
    16 rows, whatever their length.
    """
    package: Any = import_module("gguf")
    wanted = package.GGMLQuantizationType(kind)
    quantizer: Any = getattr(import_module("gguf.quants"), wanted.name, None)
    if wanted.name in ("F32", "F16") or quantizer is None:
        values: np.ndarray = package.dequantize(data, wanted)
        return values
    quantizer.init_grid()
    rows = np.asarray(data).reshape(-1, data.shape[-1])
    width = data.shape[-1] // quantizer.type_size * quantizer.block_size
    result = np.empty((len(rows), width), dtype=np.float32)
    step = max(1, _AT_ONCE // width)
    for start in range(0, len(rows), step):
        result[start : start + step] = quantizer.dequantize_rows(rows[start : start + step])
    return result.reshape(*data.shape[:-1], width)


def file_of_hub(name: str, file: str, revision: str | None) -> tuple[Path, str | None]:
    """Returns a file of a repository, which is fetched where it is not here, and its commit."""
    found = str(cached_file(name, file, revision=revision))
    return Path(found), extract_commit_hash(found, None)
