"""Base weights and buffers stored in an adapter folder.

PEFT writes embeddings with ``save_embedding_layers``, for vocabularies that were resized, and puts
them in the place of the base's own. Running statistics that training changed are in our folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.fingerprint import buffer_checksums
from lightning_peft.engine.record import AdaptedModuleRecord

_WRAPPED = ".base_layer."


def base_tensors(
    part: nn.Module, entry: AdaptedModuleRecord, keys: Iterable[str]
) -> dict[str, tuple[str, Tensor]]:
    """Returns the weights and buffers of the base among ``keys``, with their names as of now."""
    state, adapters = part.state_dict(), adapter_parameters(part)
    found = {}
    for key in keys:
        for name in (key, key.replace(_WRAPPED, ".")):
            value = state.get(name)
            if isinstance(value, Tensor) and name not in adapters:
                found[key] = (name, value)
                break
    return found


def differences(
    entry: AdaptedModuleRecord,
    brought: Mapping[str, tuple[str, Tensor]],
    tensors: Mapping[str, Tensor],
    adapter_name: str,
) -> tuple[list[str], list[str]]:
    """Returns the names of brought base weights with other values, and why some cannot be used."""
    changed, problems = [], []
    others = [name for name in entry.adapters if name != adapter_name]
    for key, (name, mine) in brought.items():
        value = tensors[key]
        if value.is_floating_point() and not mine.is_floating_point():
            problems.append(
                f"{key}: the file has the weight that adapters were merged into, and in the module "
                "it is quantized. Load the folder onto the dense base, or the checkpoint of the run"
            )
        elif value.shape != mine.shape:
            problems.append(
                f"{key}: {tuple(value.shape)} in the file, {tuple(mine.shape)} in the module"
                + _vocabulary(value, mine)
            )
        elif mine.is_meta or not torch.equal(value.to(mine.dtype), mine.cpu()):
            changed.append(name)
            if others:
                problems.append(
                    f"{key}: the file brings other values of the base, which the adapters "
                    f"{', '.join(others)} use too. Load it onto a module of its own"
                )
    return changed, problems


def _vocabulary(value: Tensor, mine: Tensor) -> str:
    if value.ndim != 2 or mine.ndim != 2 or value.shape[1] != mine.shape[1]:
        return ""
    return (
        f". The adapter was trained with a vocabulary of {value.shape[0]}, and this one has "
        f"{mine.shape[0]}: call model.resize_token_embeddings({value.shape[0]}) first"
    )


def include_in_files(module: nn.Module, entry: AdaptedModuleRecord, names: Iterable[str]) -> None:
    """Makes base weights or buffers, named in the part, a part of checkpoints and folders."""
    entry.replaced = sorted({*entry.replaced, *names})
    part = module.get_submodule(entry.name)
    held = dict(part.named_parameters(remove_duplicate=False))
    ids = {id(held[name]) for name in entry.replaced if name in held}
    entry.frozen -= {
        name for name, param in module.named_parameters(remove_duplicate=False) if id(param) in ids
    }
    plain = {name.replace(_WRAPPED, ".") for name in entry.replaced}
    entry.base = entry.base.only(lambda name: name not in plain)


def changed_buffers(part: nn.Module, entry: AdaptedModuleRecord) -> dict[str, Tensor]:
    """Returns the persistent buffers that are not as they were loaded, by name.

    Training moves the running statistics of batch norm, and the adapter was trained with them.
    PEFT puts them into the base as well.
    """
    before, buffers = entry.buffers, dict(part.named_buffers())
    return {
        name: buffers[name]
        for name, total in buffer_checksums(part).items()
        # Wrappers of PEFT have changed the name since.
        if before.get(name, before.get(name.replace(_WRAPPED, "."), total)) != total
    }


def keys_in_file(entry: AdaptedModuleRecord, targets: Iterable[str]) -> dict[str, str]:
    """Returns PEFT's keys of the base weights that files hold, by their names in the part."""
    adapted = set(targets)
    keys = {}
    for name in entry.replaced:
        owner, _, leaf = name.rpartition(".")
        keys[name] = f"{owner}{_WRAPPED}{leaf}" if owner in adapted else name
    return keys
