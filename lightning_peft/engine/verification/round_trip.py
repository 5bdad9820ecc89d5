"""Checks that checkpoints restore everything that training changes."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_peft.engine.adapters import adapter_parameters, set_adapter
from lightning_peft.engine.files.adapter_files import save_adapter
from lightning_peft.engine.files.adapter_format import saved_modules
from lightning_peft.engine.files.adapter_loading import load_adapter
from lightning_peft.engine.files.state_dicts import load_trainable_state_dict, trainable_state_dict
from lightning_peft.engine.record import adapted_parts, require_record
from lightning_peft.engine.selection.parts import inside
from lightning_peft.engine.verification.probe import perturb
from lightning_peft.engine.verification.result import Check, abbreviated
from lightning_peft.errors import LightningPeftError

Loss = Callable[[], "Tensor | None"]


def checkpoint_round_trip(module: nn.Module, loss: Loss) -> Check:
    """Saves as a checkpoint does, changes all trainable values, and loads."""
    name = "a checkpoint gives back everything that trains"
    tensors = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def save_and_load(change: Callable[[], None]) -> None:
        state = {
            key: value.detach().clone() if isinstance(value, Tensor) else value
            for key, value in trainable_state_dict(module).items()
        }
        change()
        load_trainable_state_dict(module, state)

    return _round_trip(name, tensors, loss, save_and_load)


def adapter_files_round_trip(module: nn.Module, loss: Loss) -> Check:
    """Saves every adapter as a folder, changes the values, and loads the folders."""
    name = "adapter files give back every adapter"
    record = require_record(module)
    if record.shards > 1:
        return Check(name, None, "they are read where the base is whole: load the checkpoint there")
    rewritten = [
        adapter
        for adapter in record.adapter_names
        if any(adapter in p.adapters and p.adapters[adapter].initial for p in record.parts.values())
    ]
    names = [adapter for adapter in record.adapter_names if adapter not in rewritten]
    if not names:
        why = "their initialisation rewrote the base, so files hold them for the base from before"
        return Check(name, None, why)
    tensors = {n: p for adapter in names for n, p in _in_files(module, adapter).items()}

    def save_and_load(change: Callable[[], None]) -> None:
        active = record.active
        with tempfile.TemporaryDirectory() as folder:
            for index, adapter in enumerate(names):
                with warnings.catch_warnings():
                    # How PEFT reads the files does not matter: they are read here.
                    warnings.simplefilter("ignore", UserWarning)
                    save_adapter(module, Path(folder, str(index)), adapter_name=adapter)
            change()
            try:
                for index, adapter in enumerate(names):
                    parts = [n for n, part in record.parts.items() if adapter in part.adapters]
                    load_adapter(
                        module,
                        Path(folder, str(index)),
                        adapter_name=adapter,
                        adapt=parts[0] if len(parts) == 1 else None,
                        is_trainable=True,
                    )
            finally:
                # Loading makes each adapter the active one.
                set_adapter(module, active)

    return _round_trip(name, tensors, loss, save_and_load)


def _in_files(module: nn.Module, adapter: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for entry, part in adapted_parts(module):
        if adapter not in entry.adapters:
            continue
        own = {n: p for n, p in adapter_parameters(part).items() if adapter in n.split(".")}
        heads = saved_modules(part, entry, adapter)
        own |= {n: p for n, p in part.named_parameters() if p.requires_grad and inside(n, heads)}
        found |= {entry.qualified(n): param for n, param in own.items()}
    return found


def _round_trip(
    name: str,
    tensors: Mapping[str, Tensor],
    loss: Loss,
    save_and_load: Callable[[Callable[[], None]], None],
) -> Check:
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    first = loss()
    try:
        save_and_load(lambda: perturb(tensors, seed=1))
    except LightningPeftError as error:
        return Check(name, False, str(error))
    lost = [key for key, value in before.items() if not torch.equal(tensors[key], value)]
    if lost:
        return Check(name, False, f"not given back: {abbreviated(lost)}")
    second = loss()
    if first is None or second is None:
        return Check(name, True, f"{len(before)} tensors, bit for bit")
    same = torch.allclose(first, second, rtol=1e-4, atol=0, equal_nan=True)
    detail = f"{len(before)} tensors, bit for bit"
    if not same:
        detail += f", but the loss was {first.item():g} and is {second.item():g}"
    return Check(name, same, detail)
