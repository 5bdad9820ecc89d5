"""Hyperparameters that would put the base model, or code, into every checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)

_KEY = "hyper_parameters"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.Tensor, torch.dtype, torch.device)


def without_objects(checkpoint: dict[str, Any], module: Any) -> tuple[dict[str, Any], list[str]]:
    """Takes objects such as models out of the saved hyperparameters.

    ``save_hyperparameters()`` in a module whose constructor takes a model would pickle that model,
    base included, into every checkpoint, and make the file unreadable without running code.

    Returns:
        The checkpoint, and the names of what was left out.
    """
    saved = checkpoint.get(_KEY)
    if not saved:
        return checkpoint, []
    left_out = [str(name) for name, value in saved.items() if not _is_plain(value)]
    if not left_out:
        return checkpoint, []
    if not module.__dict__.get("_warned_of_hyperparameters"):
        module.__dict__["_warned_of_hyperparameters"] = True
        log.warning(
            "save_hyperparameters() kept objects (%s) that a checkpoint cannot hold safely: a "
            "model among them would be stored with its base weights. They are left out; pass them "
            "to load_from_checkpoint, and write self.save_hyperparameters(ignore=%r).",
            ", ".join(left_out),
            left_out,
        )
    kept = {name: value for name, value in saved.items() if str(name) not in left_out}
    return {**checkpoint, _KEY: kept}, left_out


def _is_plain(value: Any) -> bool:
    if type(value) in (dict,) or type(value).__name__ == "AttributeDict":
        return all(_is_plain(item) for item in value.values())
    if type(value) in (list, tuple, set):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN) and type(value) in _PLAIN or type(value) is torch.Size
