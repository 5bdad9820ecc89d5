"""Checkpoints for Fabric: adapters, optimizers and random state."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_peft import engine
from lightning_peft.errors import CheckpointError, ConfigError, itemize
from lightning_peft.plugin.adapter_checks import check_frozen, check_same_base_on_all_ranks
from lightning_peft.plugin.checkpoint_content import (
    CHECKPOINT_KEY,
    load_tensors,
    pack_checkpoint,
    unpack_checkpoint,
)
from lightning_peft.plugin.checkpoint_io import (
    read_checkpoint,
    write_adapter_folder,
    write_whole_file,
)
from lightning_peft.plugin.random_state import random_state, set_random_state

_STATE = "fabric_state"


def save_fabric_checkpoint(
    fabric: Any,
    path: str | os.PathLike[str],
    module: Any,
    optimizers: Any = (),
    **state: Any,
) -> Path:
    """Saves a module with adapters, its optimizers and the random state; called in all processes.

    The file holds everything but the frozen base and what ``exclude_from_checkpoint`` of
    :func:`lightning_peft.inject` means; an adapter folder in PEFT's format comes with it.

    Args:
        fabric: The ``Fabric``.
        path: The file, by the usual name ``.ckpt``; an older one is replaced when all is written.
        module: What ``fabric.setup`` returned, or the module itself, after
            :func:`lightning_peft.inject`.
        optimizers: One optimizer or several.
        **state: Further tensors and plain values to get back, such as ``step=step``, also in
            dicts, lists and tuples. Scalars of NumPy come back as numbers of Python.

    Returns:
        The path.

    Raises:
        ConfigError: If values of ``state`` or of the optimizers could not be loaded; all are named.
        LifecycleError: If the module has no adapters, or base weights were set to train since.
        BaseMismatchError: If the processes have different bases.
    """
    plain, target = _plain_module(module), Path(path)
    engine.require_record(plain)
    check_frozen(plain)
    check_same_base_on_all_ranks(plain, fabric.world_size)
    engine.agree_on_excluded(plain, fabric.world_size)
    own = _listed(optimizers)
    _check_loadable(state, own)
    processes = engine.gathered(random_state(), fabric.world_size)
    if fabric.is_global_zero:
        tensors = engine.trainable_state_dict(plain)
        described = engine.describe(plain)
        described |= {"processes": [], "left_out": [], **engine.describe_optimizers(plain, own)}
        content = {
            "state_dict": tensors,
            "optimizer_states": [_numbers(optimizer.state_dict()) for optimizer in own],
            _STATE: {"random": processes, "user": _numbers(state)},
        }
        write_adapter_folder(target, engine.packed_adapters(plain, {}))
        excluded = engine.excluded_weights(plain)
        content = pack_checkpoint(plain, content, described, tuple(tensors), excluded)
        write_whole_file(content, target)
    fabric.barrier()
    return target


def load_fabric_checkpoint(
    fabric: Any, path: str | os.PathLike[str], module: Any, optimizers: Any = ()
) -> dict[str, Any]:
    """Loads what :func:`save_fabric_checkpoint` saved, strictly; called in all processes.

    The random state is restored where the number of processes is the same. Nothing in the file can
    run code. A module without adapters gets those of the file, before there is an optimizer: the
    way to go on with adapters that ``inject`` made from batches.

    Args:
        fabric: The ``Fabric``.
        path: The file.
        module: The module with adapters of the same settings, as for saving; or without any, before
            ``fabric.setup``.
        optimizers: As for saving, in the same order; may be left out for evaluation.

    Returns:
        The ``state`` that was saved.

    Raises:
        CheckpointError: If the file is damaged, was written by something else, or does not fit.
        BaseMismatchError: If the base is another one than the adapters were trained on.
    """
    plain = _plain_module(module)
    checkpoint = read_checkpoint(_read, path, None)
    if _STATE not in checkpoint or CHECKPOINT_KEY not in checkpoint:
        raise CheckpointError(
            f"{str(path)!r} was not written by save_fabric_checkpoint. Checkpoints of a Trainer "
            "are loaded by lightning_peft.load_from_checkpoint, adapter folders by load_adapter."
        )
    own = _listed(optimizers)
    if engine.record_of(plain) is None:
        engine.inject_as_described(plain := module, checkpoint[CHECKPOINT_KEY])
    checkpoint = unpack_checkpoint(plain, checkpoint)
    if own:
        engine.check_same_optimizers(checkpoint[CHECKPOINT_KEY], plain, own)
    engine.check_description(plain, checkpoint[CHECKPOINT_KEY])
    load_tensors(plain, checkpoint, strict=True)
    for optimizer, saved in zip(own, checkpoint["optimizer_states"], strict=False):
        optimizer.load_state_dict(saved)
        engine.restore_paging(optimizer)
    processes = checkpoint[_STATE]["random"]
    if len(processes) == fabric.world_size:
        set_random_state(processes[fabric.global_rank])
    user: dict[str, Any] = checkpoint[_STATE]["user"]
    return user


def _check_loadable(state: dict[str, Any], optimizers: list[Any]) -> None:
    """Checks that ``load_fabric_checkpoint``, which runs no code, will take the values."""
    values = dict(state)
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            values |= {f"{key} of optimizer {index}": value for key, value in settings.items()}
    objects = [f"{name}={v!r:.60}" for name, v in values.items() if not _is_loadable(v)]
    if objects:
        raise ConfigError(
            "These values could not be loaded again without running code in the file:"
            + itemize(objects)
            + "\nGive tensors, numbers, texts, and dicts, lists or tuples of them: str(path) for a "
            "path, torch.as_tensor(array) for an array."
        )


def _is_loadable(value: Any) -> bool:
    file = io.BytesIO()
    try:
        # All but the tensors, which may be large and are always taken.
        torch.save(_numbers(value, tensors=False), file)
        file.seek(0)
        _read(file, weights_only=True)
    except Exception:
        return False
    return True


def _numbers(value: Any, tensors: bool = True) -> Any:
    """Returns a value with numbers of Python for NumPy's, which are objects."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value if tensors else None
    if type(value) is dict:
        pairs = value.items()
        return {_numbers(key, tensors): _numbers(item, tensors) for key, item in pairs}
    if type(value) in (list, tuple, set):
        return type(value)(_numbers(item, tensors) for item in value)
    return value


def _plain_module(module: Any) -> Any:
    """Returns the module that ``fabric.setup`` wrapped, at any depth."""
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"module={type(module).__name__}: a torch.nn.Module is meant.")
    while engine.record_of(module) is None and isinstance(
        getattr(module, "module", None), torch.nn.Module
    ):
        module = module.module
    return module


def _listed(optimizers: Any) -> list[Any]:
    several = isinstance(optimizers, Iterable)
    return [getattr(one, "optimizer", one) for one in (optimizers if several else [optimizers])]


def _read(path: Any, weights_only: bool) -> Any:
    return torch.load(path, map_location="cpu", weights_only=weights_only)
