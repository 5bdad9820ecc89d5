"""Hyperparameters that would put the base model, or code, into every checkpoint."""

from __future__ import annotations

from typing import Any

import torch

# Where Lightning puts the hyperparameters of the module and of the datamodule.
MODULE_KEY = "hyper_parameters"
DATAMODULE_KEY = "datamodule_hyper_parameters"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.Tensor, torch.dtype, torch.device)


def strip_objects(
    checkpoint: dict[str, Any], key: str = MODULE_KEY
) -> tuple[dict[str, Any], list[str]]:
    """Takes objects such as models out of the saved hyperparameters.

    ``save_hyperparameters()`` in a module whose constructor takes a model would pickle that model,
    base included, into every checkpoint, and make the file unreadable without running code.

    Returns:
        The checkpoint, and the names of what was left out.
    """
    saved = checkpoint.get(key)
    # OmegaConf's containers are not dicts; the CheckpointIO warns of them.
    if not isinstance(saved, dict):
        return checkpoint, []
    left_out = [str(name) for name, value in saved.items() if not _is_plain(value)]
    if not left_out:
        return checkpoint, []
    kept = {name: value for name, value in saved.items() if str(name) not in left_out}
    return {**checkpoint, key: kept}, left_out


def _is_plain(value: Any) -> bool:
    if type(value) is dict or type(value).__name__ == "AttributeDict":
        return all(_is_plain(item) for item in value.values())
    if type(value) in (list, tuple, set, torch.Size):
        return all(_is_plain(item) for item in value)
    return type(value) in _PLAIN
