"""Folders with PEFT's ``trainable_token_indices``: new values of some rows of an embedding.

They are read as an embedding that was trained in full, which computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine.selection.targets import all_names
from lightning_peft.errors import CheckpointError, UnsupportedError, itemize

FIELD = "trainable_token_indices"
_SUFFIX = ".token_adapter.trainable_tokens_delta"


def rows_as_modules(
    part: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Returns fields and tensors with whole embeddings in the place of rows ``(tokens, width)``.

    Returns:
        The fields without the indices, the tensors, and the names of the modules that hold the
        embeddings, tied ones included.
    """
    asked = fields.get(FIELD)
    if not asked:
        # PEFT looks for an embedding where there is an empty list.
        return {**fields, FIELD: None} if FIELD in fields else dict(fields), dict(tensors), []
    changed = {key: value for key, value in tensors.items() if not key.endswith(_SUFFIX)}
    names: list[str] = []
    for key in [key for key in tensors if key.endswith(_SUFFIX)]:
        name = key.removesuffix(_SUFFIX)
        weight = _weight(part, name)
        rows = _indices(asked, name)
        _check_rows(weight, rows, tensors[key], name)
        whole = weight.detach().cpu().clone()
        whole[torch.tensor(rows)] = tensors[key].to(whole.dtype)
        for holder in _holders(part, weight):
            changed[f"{holder}.weight"] = whole
            names.append(holder)
    if not names:
        raise CheckpointError(f"{FIELD}={asked!r}: the file holds no values of these tokens.")
    return {**fields, FIELD: None}, changed, list(dict.fromkeys(names))


def refuse_training(fields: Mapping[str, Any], folder: Path) -> None:
    """Refuses a folder with single rows where its adapter is to be trained further."""
    if fields.get(FIELD):
        raise UnsupportedError(
            f"{FIELD} in {str(folder)!r}: single rows are not trained here, so the adapter is "
            "loaded for its output only. Leave is_trainable out."
        )


def _weight(part: nn.Module, name: str) -> Tensor:
    module = dict(part.named_modules()).get(name)
    weight = None if module is None else module._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        raise CheckpointError(
            f"{FIELD}: {name} is not an embedding of {type(part).__name__}, which the file has "
            "tokens of."
        )
    if weight.is_meta or not weight.is_floating_point():
        raise UnsupportedError(
            f"{FIELD}: the file has some rows of {name}, and the others are not there as numbers "
            "(an outline without values, or a quantized layer). Load the adapter onto the whole "
            "model in 16 or 32 bits."
        )
    return weight


def _indices(asked: Any, name: str) -> list[int]:
    if isinstance(asked, dict):
        asked = next((rows for entry, rows in asked.items() if name.endswith(entry)), [])
    return list(asked)


def _check_rows(weight: Tensor, rows: list[int], values: Tensor, name: str) -> None:
    problems = []
    if values.shape != (len(rows), weight.shape[1]):
        problems.append(
            f"{name}: {len(rows)} tokens of width {weight.shape[1]} are named, and the file has "
            f"{tuple(values.shape)}"
        )
    beyond = [row for row in rows if not 0 <= row < weight.shape[0]]
    if beyond:
        problems.append(
            f"{name}: tokens {beyond[:5]} of a vocabulary of {weight.shape[0]}; call "
            "model.resize_token_embeddings first, as was done before training"
        )
    if problems:
        raise CheckpointError(f"{FIELD} does not fit:" + itemize(problems))


def _holders(part: nn.Module, weight: Tensor) -> list[str]:
    return [
        name
        for name in all_names(part)
        if part.get_submodule(name)._parameters.get("weight") is weight
    ]
