"""Base weights and buffers stored in an adapter folder, and key names that PEFT expects.

PEFT writes embeddings with ``save_embedding_layers``, for vocabularies that were resized, and puts
them in the place of the base's own. Running statistics that training changed are in our folders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.fingerprint import buffer_checksums
from lightning_peft.engine.record import AdaptedModuleRecord
from lightning_peft.engine.selection.targets import all_names

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


def saved_entries(part: nn.Module, saved: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Returns the entries of ``modules_to_save`` by which PEFT finds the modules ``saved``.

    A module that PEFT would take for others too gets none. Its values are in the file all the
    same, and PEFT puts them into the base.
    """
    wanted, adapted, names = set(saved), set(targets), all_names(part)
    keys = [known for name in names for known in names[name]]
    keys += [f"{target}.{added}" for target in adapted for added in _added(part, target)]
    # One that has two names would get a copy under each.
    meant = {name for name in wanted if len(names[name]) == 1}
    entries = []
    for name in sorted(meant, key=list(names).index):
        clear = (e for e in _candidates(name) if not _means_others(e, meant, keys, adapted))
        entries += [entry for entry in [next(clear, None)] if entry is not None]
    return entries


def _added(part: nn.Module, target: str) -> list[str]:
    """Names that PEFT adds below a layer that it wraps, on loading a file."""
    children = part.get_submodule(target).named_children()
    held = [name for name, child in children if isinstance(child, nn.ModuleDict) and len(child)]
    return ["base_layer", *(f"{name}.default" for name in held)]


def _candidates(name: str) -> list[str]:
    steps = name.split(".")
    ends = [".".join(steps[-count:]) for count in range(1, len(steps) + 1)]
    return [name, *(f".{end}" for end in reversed(ends[:-1]))]


# PEFT takes an entry of `modules_to_save` for the end of a name (`fc` is `c_fc` too).
def _means_others(entry: str, meant: set[str], keys: list[str], adapted: set[str]) -> bool:
    if any(key.endswith(entry) and key not in meant for key in keys):
        return True
    # PEFT's own expression, in which the entry is not escaped.
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", key) for key in adapted)


def replaced_under_one_name(part: nn.Module, targets: Iterable[str]) -> list[str]:
    """Returns a sentence for each adapted layer that PEFT would not find under all its names."""
    names = all_names(part)
    return [
        f"{target} is also called {', '.join(names[target][1:])}, and PEFT would replace it under "
        "one name"
        for target in targets
        if len(names.get(target, ())) > 1
    ]
