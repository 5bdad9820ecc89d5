"""Checkpoints of modules whose own hooks leave keys out: the adapters stay in, the base stays out.

``state_dict()``, ``on_save_checkpoint`` and ``on_load_checkpoint`` of a module may filter or rename
what a checkpoint holds, usually to leave out a pretrained part, which now has adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lightning_peft import engine

# Key of the checkpoint dictionary under which everything of this package is.
CHECKPOINT_KEY = "lightning_peft"
# The name of an entry of every checkpoint's state_dict: whoever loads the file without this
# package is stopped and reads it, instead of getting the bare base.
LOAD_GUARD_KEY = "adapters only: load this file with lightning_peft.load_from_checkpoint"


def pack_checkpoint(
    module: torch.nn.Module,
    checkpoint: Mapping[str, Any],
    described: Mapping[str, Any],
    before: Collection[str],
) -> dict[str, Any]:
    """Returns the content to write: the description and all adapters, without the base.

    Args:
        module: The module with adapters.
        checkpoint: What Lightning and the hooks made.
        described: What :data:`CHECKPOINT_KEY` is to hold.
        before: The names in ``state_dict`` before hooks changed it.
    """
    own = engine.checkpoint_tensors(module)
    state = engine.drop_frozen_base(module, checkpoint.get("state_dict") or {})
    record = engine.require_record(module)
    # A base weight with an impossible shape is refused even by load_state_dict(strict=False).
    guard = next(part.qualified(n) for part in record.parts.values() for n in part.base.names)
    described = {
        **described,
        "guard": guard,
        "kept": {name: tensor for name, tensor in own.items() if name not in state},
        "removed": [name for name in before if name not in state and name not in own],
    }
    guards = {LOAD_GUARD_KEY: torch.empty(0), guard: torch.empty(0)}
    return {**checkpoint, "state_dict": {**state, **guards}, CHECKPOINT_KEY: described}


def unpack_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint that was read, before hooks see it.

    Without the entries that stop others from loading it, and with the adapters kept where no hook
    looks.
    """
    if CHECKPOINT_KEY not in checkpoint:
        return checkpoint
    described = checkpoint[CHECKPOINT_KEY]
    guards = (LOAD_GUARD_KEY, described.get("guard"))
    state = {k: v for k, v in checkpoint["state_dict"].items() if k not in guards}
    return {
        **checkpoint,
        "state_dict": state,
        CHECKPOINT_KEY: {**described, "written": dict(state)},
    }


def load_tensors(module: Any, checkpoint: Mapping[str, Any], strict: bool) -> None:
    """Loads the tensors of a checkpoint, after the hooks of the module changed it.

    Raises:
        CheckpointError: If it does not fit; everything that differs is named.
    """
    described = checkpoint[CHECKPOINT_KEY]
    removed = () if strict else described.get("removed", ())
    written = described["written"]
    adapters = {n: written[n] for n in engine.adapter_names_of(module) if n in written}
    kept = {**described.get("kept", {}), **adapters}
    state = checkpoint.get("state_dict") or {}
    engine.load_trainable_state_dict(module, state, kept, removed)
