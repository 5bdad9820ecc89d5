"""Content of checkpoints of modules with hooks that filter keys.

``state_dict()``, ``on_save_checkpoint`` and ``on_load_checkpoint`` of a module may filter or rename
what a checkpoint holds, usually to leave out a pretrained part, which now has adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from lightning_peft import engine

log = logging.getLogger(__name__)

# Key of the checkpoint dictionary under which everything of this package is.
CHECKPOINT_KEY = "lightning_peft"
# The name of an entry of every checkpoint's state_dict: whoever loads the file without this
# package is stopped and reads it, instead of getting the bare base.
LOAD_GUARD_KEY = "adapters only: load this file with lightning_peft.load_from_checkpoint"
# Where Lightning puts the hyperparameters of the module and of the datamodule.
MODULE_KEY = "hyper_parameters"
DATAMODULE_KEY = "datamodule_hyper_parameters"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.Tensor, torch.dtype, torch.device)


def pack_checkpoint(
    module: torch.nn.Module,
    checkpoint: Mapping[str, Any],
    described: Mapping[str, Any],
    before: Collection[str],
    excluded: Mapping[str, engine.BuiltWeight] | None = None,
) -> dict[str, Any]:
    """Returns the content to write: the description and all adapters, without the base.

    ``before`` has the names in ``state_dict`` before hooks changed it, ``excluded`` what the module
    loads itself besides the base. Where hooks took that away or put others there, it is theirs.
    """
    own = engine.checkpoint_tensors(module)
    state = engine.drop_frozen_base(module, checkpoint.get("state_dict") or {})
    params = dict(module.named_parameters(remove_duplicate=False))
    left_out = {
        name: [weight.total, weight.exact, weight.dtype]
        for name, weight in (excluded or {}).items()
        if engine.same_memory(state.get(name), params[name])
    }
    if left_out:
        described = {**described, "format": engine.FORMATS[1], "excluded": left_out}
    record = engine.require_record(module)
    # A base weight with an impossible shape is refused even by load_state_dict(strict=False).
    names = (part.qualified(n) for part in record.parts.values() for n in part.base.tensors)
    guard = next(names, None)
    described = {
        **described,
        "guard": guard,
        "kept": {name: tensor for name, tensor in own.items() if name not in state},
        "removed": [name for name in before if name not in state and name not in own],
    }
    state = {name: value for name, value in state.items() if name not in left_out}
    guards = {name: torch.empty(0) for name in (LOAD_GUARD_KEY, guard) if name is not None}
    return {**checkpoint, "state_dict": {**state, **guards}, CHECKPOINT_KEY: described}


def unpack_checkpoint(module: torch.nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint that was read, before hooks see it.

    Without the entries that stop others from loading it, with the weights that ``module`` loads
    itself, and with the adapters kept where no hook looks.
    """
    if CHECKPOINT_KEY not in checkpoint:
        return checkpoint
    described = checkpoint[CHECKPOINT_KEY]
    guards = (LOAD_GUARD_KEY, described.get("guard"))
    state = {k: v for k, v in checkpoint["state_dict"].items() if k not in guards}
    return {
        **checkpoint,
        "state_dict": {**state, **engine.excluded_tensors(module, _excluded(described))},
        CHECKPOINT_KEY: {**described, "written": dict(state)},
    }


def load_tensors(module: Any, checkpoint: Mapping[str, Any], strict: bool) -> None:
    """Loads the tensors of a checkpoint, after the hooks of the module changed it."""
    described = checkpoint[CHECKPOINT_KEY]
    excluded = _excluded(described)
    removed = [*excluded, *(() if strict else described.get("removed", ()))]
    written = described["written"]
    adapters = {n: written[n] for n in engine.adapter_names_of(module) if n in written}
    kept = {**described.get("kept", {}), **adapters}
    state = checkpoint.get("state_dict") or {}
    engine.check_excluded(module, excluded, state)
    engine.note_replaced(module, state)
    engine.load_trainable_state_dict(module, state, kept, removed)


def _excluded(described: Mapping[str, Any]) -> dict[str, engine.BuiltWeight]:
    saved = described.get("excluded", {})
    return {name: engine.BuiltWeight(*values) for name, values in saved.items()}


def without_objects(checkpoint: dict[str, Any], warn: bool) -> tuple[dict[str, Any], list[str]]:
    """Takes objects out of the saved hyperparameters; returns names of those of the module too."""
    checkpoint, _ = strip_objects(checkpoint, DATAMODULE_KEY)
    checkpoint, names = strip_objects(checkpoint)
    if names and warn:
        log.warning(
            "save_hyperparameters() kept objects (%s) that a checkpoint cannot hold safely: a "
            "model among them would be stored with its base weights. They are left out; pass "
            "them to load_from_checkpoint, and write self.save_hyperparameters(ignore=%r).",
            ", ".join(names),
            names,
        )
    return checkpoint, names


def strip_objects(
    checkpoint: dict[str, Any], key: str = MODULE_KEY
) -> tuple[dict[str, Any], list[str]]:
    """Takes objects such as models out of the saved hyperparameters; returns their names too.

    ``save_hyperparameters()`` in a module whose constructor takes a model would pickle that model,
    base included, into every checkpoint, and make the file unreadable without running code.
    """
    saved = checkpoint.get(key)
    # OmegaConf's containers are not dicts; the CheckpointIO warns of them.
    if not isinstance(saved, dict):
        return checkpoint, []
    # Those of NumPy, as from np.logspace, are numbers too.
    values = {k: v.item() if isinstance(v, np.generic) else v for k, v in saved.items()}
    left_out = [str(name) for name, value in values.items() if not _is_plain(value)]
    if not left_out and all(values[name] is value for name, value in saved.items()):
        return checkpoint, []
    kept = {name: value for name, value in values.items() if str(name) not in left_out}
    return {**checkpoint, key: kept}, left_out


def _is_plain(value: Any) -> bool:
    if type(value) is dict or type(value).__name__ == "AttributeDict":
        return all(_is_plain(item) for item in value.values())
    if type(value) in (list, tuple, set, torch.Size):
        return all(_is_plain(item) for item in value)
    return type(value) in _PLAIN
